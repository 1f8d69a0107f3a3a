"""By which names a model knows the tensors of a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from shardserve.errors import ExportError
from shardserve.export.sources.checkpoint import Checkpoint

SHOWN = 5
"""Names in a message, at most."""


def named_as_in(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's tensors by the model's names. For a model of transformers, by its own rules: with the base
    model's prefix or without, names of earlier releases. ExportError for tensors that would have to be put together
    from several."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return checkpoint
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise ExportError(f"this release of transformers isn't supported: {error}") from error
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    converted: list[str] = []

    def rename(name: str) -> str:
        new, rule = rename_source_key(name, renamings, converters, prefix, known)
        if rule is not None and name not in known:
            converted.append(name)
            return name
        return name if rule is not None else str(new)

    renamed = checkpoint.renamed(rename)
    if converted:
        raise ExportError(
            f"{next(iter(checkpoint.origins.values()))}: {named(converted)} are stored in parts that transformers puts "
            "together: load the model with from_pretrained in a module:function"
        )
    return renamed


def named(names: Sequence[str]) -> str:
    """The first of them, quoted, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more
