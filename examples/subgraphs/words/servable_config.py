"""Two methods over one model with two subgraphs: 0 reads a prompt, 1 goes on by one word."""

import numpy as np

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1, with_batch_dim=True)


def next_word(scores):
    return np.array(scores.argmax(), np.int64)


def write(ids, count):
    """One instance: ids int64 [6], count int64 [1] → the words that follow, int64 [count]."""
    # Over REST plain integers come as int32.
    scores, state = model.call(ids.astype(np.int64), subgraph=0)
    words = [next_word(scores)]
    while len(words) < count[0]:
        scores, state = model.call(state, words[-1], subgraph=1)
        words.append(next_word(scores))
    return np.stack(words)


@register.register_method(output_names=["scores", "state"])
def read(ids):
    return register.add_stage(model, ids, outputs_count=2)


@register.register_method(output_names=["words"])
def generate(ids, count):
    return register.add_stage(write, ids, count, outputs_count=1)
