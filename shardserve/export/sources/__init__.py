"""Where a model and its values come from: a function's module, a checkpoint, a Hugging Face folder, a `.pt2` file.

`without_storage` (a module whose parameters have no memory) → `load_checkpoint` (tensors by name, mapped from their
files) → `fill` (the one's parameters from the other).
"""

from shardserve.export.sources.checkpoint import Checkpoint, Weights, load_checkpoint
from shardserve.export.sources.storage import Filled, fill, has_meta, hollow, without_storage

__all__ = ["Checkpoint", "Filled", "Weights", "fill", "has_meta", "hollow", "load_checkpoint", "without_storage"]
