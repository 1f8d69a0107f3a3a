"""Greedy generation: each method call has the model's buffers to itself, from its prompt to its last word."""

import numpy as np

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=4, stage_size=2, stateful=True)


def write(ids, count):
    """One instance: ids int64 [t], count int64 [1] → the words that follow, int64 [count]."""
    # Over REST plain integers come as int32.
    words = [model.call(ids.astype(np.int64), subgraph=0).argmax()]
    while len(words) < count[0]:
        words.append(model.call(words[-1], subgraph=1).argmax())
    return np.stack(words)


@register.register_method(output_names=["words"])
def generate(ids, count):
    return register.add_stage(write, ids, count, outputs_count=1)
