"""Text in, label out: a Python stage before the model and one after it."""

import zlib

import numpy as np

from shardserve.server import register

LENGTH = 16
WORDS = 512
LABELS = ("billing", "delivery", "returns")

model = register.declare_model("device0/text_score.graph.json", "shardserve")


def tokenize(text):
    """One instance: str → ids int64 [16]. An exception here is the answer to this instance alone."""
    words = text.lower().split()
    if not words:
        raise ValueError("the text has no words")
    ids = np.zeros(LENGTH, np.int64)
    for i, word in enumerate(words[:LENGTH]):
        ids[i] = 1 + zlib.crc32(word.encode()) % (WORDS - 1)
    return ids


def label(instances):
    """A batch, of whichever requests wait: yields label and probability for each instance's scores float32 [3]."""
    scores = np.stack([instance[0] for instance in instances])
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    for row in exponents / exponents.sum(1, keepdims=True):
        yield LABELS[row.argmax()], row.max()


@register.register_method(output_names=["label", "probability"])
def classify(text):
    ids = register.add_stage(tokenize, text, outputs_count=1)
    scores = register.add_stage(model, ids, outputs_count=1)
    return register.add_stage(label, scores, outputs_count=2, batch_size=0)
