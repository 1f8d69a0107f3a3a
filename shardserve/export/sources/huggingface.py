"""Folders in the Hugging Face layout: `config.json` and safetensors. Nothing is fetched, no code of the folder runs."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export.sources.checkpoint import Checkpoint, load_checkpoint
from shardserve.export.sources.storage import without_storage

logger = logging.getLogger(__name__)

CONFIG = "config.json"
MOST_ROWS = 64
"""Of the default batch dim."""
LONGEST = 2048
"""Of the default sequence dim: what --verify can still compute."""
LENGTH = 16
"""Of the example's sequences."""
IMAGE = 224
"""The sides of the example's image, where the config has none."""
SAMPLES = 16000
"""Of the example's sound: a second, for most."""


@dataclass(frozen=True)
class Folder:
    """A model of a folder, without values, and the checkpoint that they are in, unless none was asked for; example
    inputs by keyword and their dynamic dims."""

    model: nn.Module
    checkpoint: Checkpoint | None
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def load_folder(path: str | Path, meta: bool = False) -> Folder:
    """The model that `config.json` names, its parameters on the meta device, and its checkpoint, mapped; `meta`: only
    the model, of which there may be no weights yet.

    Raises ExportError where the transformers package isn't there, the folder needs code of its own, holds quantised
    weights or no safetensors, or where the model's class takes inputs that have no default example.
    """
    path = Path(path)
    config_file = path / CONFIG
    try:
        content = json.loads(config_file.read_bytes())
    except OSError as error:
        raise ExportError(f"{config_file}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{config_file}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ExportError(f"{config_file}: names no model_type: not the folder of a model of transformers")
    if "quantization_config" in content:
        raise ExportError(f"{config_file}: the weights are quantised, which isn't supported")
    checkpoint = None if meta else load_checkpoint(path)
    model = _model(path, content, checkpoint)
    kwargs, dynamic_shapes = _example(model, str(config_file))
    return Folder(model, checkpoint, kwargs, dynamic_shapes)


def _transformers() -> Any:
    # Read when its hub client is imported: it has no business with the network here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ExportError(
            f"a Hugging Face folder needs the transformers package: pip install 'shardserve[transformers]' ({error})"
        ) from error
    return transformers


def _model(path: Path, content: Mapping[str, Any], checkpoint: Checkpoint | None) -> nn.Module:
    transformers = _transformers()
    where, kind = path / CONFIG, content["model_type"]
    architectures = content.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kinds = transformers.CONFIG_MAPPING
    if kind not in kinds or (name is not None and not hasattr(transformers, str(name))):
        own = ", and code of the folder's own is never run" if "auto_map" in content else ""
        missing = f"model_type '{kind}'" if kind not in kinds else f"architecture '{name}'"
        raise ExportError(
            f"{where}: transformers {transformers.__version__} has no {missing}{own}; write a module:function that "
            "makes the model, with options['weights']"
        )
    try:
        config = kinds[kind].from_pretrained(path, local_files_only=True)
        dtype = _dtype(config, checkpoint)
        config.use_cache = False
        with without_storage():
            made = transformers.AutoModel.from_config if name is None else getattr(transformers, name)._from_config
            model: Any = made(config, dtype=dtype)
        if model._can_set_experts_implementation():
            # The others loop over the experts that were hit, or are operators of transformers' own.
            model.set_experts_implementation("batched_mm")
        if name is None:
            logger.warning(
                "%s: names no architectures: it is taken for %s, without a head", where, type(model).__name__
            )
        return model.eval()  # type: ignore[no-any-return]
    except Exception as error:  # what the model's own constructor makes of the config
        text = " ".join(str(error).split())
        raise ExportError(f"{where}: can't make the model: {type(error).__name__}: {text}") from error


def _dtype(config: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    """The config's, else that of the checkpoint's first weight, as transformers has it."""
    given = getattr(config, "dtype", None)
    if isinstance(given, str):
        given = getattr(torch, given, None)
    if isinstance(given, torch.dtype):
        return given
    stored = checkpoint.tensors.values() if checkpoint is not None else ()
    return next((tensor.dtype for tensor in stored if tensor.is_floating_point()), torch.float32)


def _example(model: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs of 2 rows and their dynamic dims, after the model's main input."""
    taken = inspect.signature(model.forward).parameters
    config = model.config
    rows = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    main = model.main_input_name
    inputs: dict[str, Tensor]
    shapes: dict[str, Any]
    if main == "input_ids":
        inputs, shapes = _text(model, "input_ids", "attention_mask", "sequence", rows)
    elif main == "pixel_values":
        inputs, shapes = _image(config, rows)
    elif main == "input_values":
        inputs, shapes = {main: torch.randn(2, SAMPLES)}, {main: {0: rows}}
    elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper and its kin: the encoder halves the frames, and takes one length only.
        inputs, shapes = {main: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}, {main: {0: rows}}
    else:
        raise ExportError(
            f"{where}: no default example for {type(model).__name__}, whose main input is '{main}': {_OWN}"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        more, more_shapes = _text(model, "decoder_input_ids", "", "target", rows)
        inputs, shapes = {**inputs, **more}, {**shapes, **more_shapes}
    if main == "input_ids" and hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        # CLIP and its kin compare the two.
        more, more_shapes = _image(config, rows)
        inputs, shapes = {**inputs, **more}, {**shapes, **more_shapes}
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items() if name in taken
    }
    return dict(inputs), {name: shapes[name] for name in inputs}


_OWN = "write a module:function that gives model and inputs, with the folder as options['weights']"


def _text(model: Any, ids: str, mask: str, dim: str, rows: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    longest = min(LONGEST, _positions(model, config) or LONGEST)
    length = min(LENGTH, longest)
    columns = torch.export.Dim(dim, min=1, max=longest)
    generator = torch.Generator().manual_seed(0)
    inputs = {ids: torch.randint(0, max(config.vocab_size, 1), (2, length), generator=generator)}
    if (pad := getattr(config, "pad_token_id", None)) is not None:
        # Positions that follow from where padding is would be the padding's own.
        inputs[ids][inputs[ids] == pad] = (pad + 1) % config.vocab_size
    if mask:
        inputs[mask] = torch.ones(2, length, dtype=torch.int64)
    return inputs, {name: {0: rows, 1: columns} for name in inputs}


def _image(config: Any, rows: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    vision = getattr(config, "vision_config", config)
    sides = getattr(vision, "image_size", None) or IMAGE
    height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)
    image = torch.randn(2, getattr(vision, "num_channels", 3), height, width)
    return {"pixel_values": image}, {"pixel_values": {0: rows}}


def _positions(model: nn.Module, config: Any) -> int | None:
    """How long a sequence may be; None where the config has no limit."""
    limits = (
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_target_positions")
    )
    longest = next((limit for limit in limits if limit), None)
    if not isinstance(longest, int) or longest < 2:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding's on.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return longest
