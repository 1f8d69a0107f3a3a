"""By which names a model knows the tensors of a checkpoint, and what of it has to be put together first."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export.sources.checkpoint import Checkpoint
from shardserve.export.weights_file import write_weights
from shardserve.shards.weights import WeightsFile

SHOWN = 5
"""Names in a message, at most."""


def named_as_in(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's tensors by the model's names.

    For a model of transformers, by its own rules: with the base model's prefix or without, names of earlier releases,
    and tensors that it keeps otherwise than their files do (all experts of a layer in one). Those are made one after
    the other and mapped from a temporary file ($TMPDIR), so that they take no memory either. ExportError where they
    can't be made.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return checkpoint
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise ExportError(f"this release of transformers isn't supported: {error}") from error
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    conversions: dict[str, Any] = {}
    parts: dict[str, list[str]] = {}
    # In this order experts are put together by their numbers.
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None or new not in known:
            names[name] = str(new) if pattern is None else name
            continue
        converter = conversions.setdefault(new, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(new, name, pattern, checkpoint.tensors[name])
        parts.setdefault(new, []).append(name)
    renamed = checkpoint.renamed(names)
    tensors, origins = dict(renamed.tensors), dict(renamed.origins)
    for target, converter in conversions.items():
        where = f"{checkpoint.origins[parts[target][0]]} ({named(parts[target])} there)"
        try:
            made = converter.convert(target, model=model, config=model.config)
            values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        except Exception as error:  # what transformers makes of tensors that don't fit
            text = " ".join(str(error).split())
            raise ExportError(f"{where}: can't make '{target}': {type(error).__name__}: {text}") from error
        tensors |= _mapped(values)
        origins |= dict.fromkeys(values, where)
    return Checkpoint(tensors, origins)


def _mapped(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, mapped from a file without a name, which is gone with them, whatever ends this process."""
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    try:
        with tempfile.TemporaryFile() as unnamed:
            file = Path(f"/proc/self/fd/{unnamed.fileno()}")
            write_weights(file, layout, lambda name: values[name].contiguous())
            return WeightsFile.open(file).map()
    except OSError as error:
        raise ExportError(f"{named(list(values))} can't be written to a temporary file: {error}") from error


def named(names: Sequence[str]) -> str:
    """The first of them, quoted, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more
