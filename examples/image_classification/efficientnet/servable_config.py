"""Picture in, labels out: Pillow before the model, the names of the classes after it, each a Python stage."""

import json
from pathlib import Path

import numpy as np
from preprocessing import pixels

from shardserve.server import distributed, register

TOP = 5
# The 1000 classes of ImageNet, in their order.
LABELS = np.array(json.loads(Path(__file__).with_name("labels.json").read_text()))

model = distributed.declare_servable(rank_size=2, stage_size=2)


def top(logits):
    """float32 [1000] → the most probable labels, str [5], and their probabilities, float32 [5]."""
    exponents = np.exp(logits - logits.max())
    best = exponents.argsort()[: -TOP - 1 : -1]
    return LABELS[best], exponents[best] / exponents.sum()


@register.register_method(output_names=["labels", "probabilities"])
def classify(picture):
    images = register.add_stage(pixels, picture, outputs_count=1)
    logits = register.add_stage(model, images, outputs_count=1)
    return register.add_stage(top, logits, outputs_count=2)


@register.register_method(output_names=["logits"])
def predict(picture):
    images = register.add_stage(pixels, picture, outputs_count=1)
    return register.add_stage(model, images, outputs_count=1)
