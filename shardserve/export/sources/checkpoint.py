"""Checkpoints: tensors by name from safetensors files, mapped, or from a state dict."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from shardserve.errors import ExportError, ShardError
from shardserve.shards.weights import WeightsFile

INDEX_SUFFIX = ".safetensors.index.json"
PREFERRED = ("model", "diffusion_pytorch_model")
"""What the weights of a folder are called, if there are others beside them."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")

Weights = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Tensor]
"""A safetensors file, the index of several, a folder that holds them, a list of such; or a state dict."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and where each is from, for messages. Those of files are views of them, mapped: they take no
    memory of this process's own, and only what is looked at is read."""

    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str]

    def renamed(self, renamings: Mapping[str, str]) -> Checkpoint:
        """These tensors by other names. ExportError where two get the same name."""
        names: dict[str, str] = {}
        for name, new in renamings.items():
            if new in names:
                raise ExportError(f"{self.origins[name]}: '{names[new]}' and '{name}' are both '{new}' of the model")
            names[new] = name
        origins = {
            new: self.origins[name] + ("" if new == name else f" ('{name}' there)") for new, name in names.items()
        }
        return replace(self, tensors={new: self.tensors[name] for new, name in names.items()}, origins=origins)


def load_checkpoint(weights: Weights) -> Checkpoint:
    """Opens what `weights` names. ExportError for what isn't there, isn't safetensors, or names a tensor twice."""
    if isinstance(weights, Mapping):
        for name, tensor in weights.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ExportError(f"weights: {name!r} is {type(tensor).__name__}; a state dict has tensors by name")
            if tensor.is_meta:
                raise ExportError(f"weights: '{name}' is on the meta device, without values")
        return Checkpoint(dict(weights), dict.fromkeys(weights, "weights"))
    listed = [weights] if isinstance(weights, (str, os.PathLike)) else weights
    if not isinstance(listed, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in listed):
        raise ExportError(f"weights: {type(weights).__name__} is neither a path, a list of paths nor a state dict")
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for file, wanted in [found for path in listed for found in _files(Path(path))]:
        if file.suffix in PICKLED:
            raise ExportError(f"{file}: may run code when it is read; only safetensors files are: save it as one")
        try:
            held = WeightsFile.open(file).map()
        except ShardError as error:
            raise ExportError(str(error)) from error
        for name in held if wanted is None else wanted:
            if name not in held:
                raise ExportError(f"{file}: tensor '{name}' is missing; the index says it is there")
            if name in tensors:
                raise ExportError(f"{file}: tensor '{name}' is in {origins[name]}, too")
            tensors[name], origins[name] = held[name], str(file)
    return Checkpoint(tensors, origins)


def _files(path: Path) -> list[tuple[Path, Sequence[str] | None]]:
    """The files behind a path, with the tensors to take from each; None: all."""
    if path.is_dir():
        path = _of_folder(path)
        if path.is_dir():
            return [(file, None) for file in sorted(path.glob("*.safetensors"))]
    if path.suffix != ".json":
        return [(path, None)]
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict):
        raise ExportError(f"{path}: has no weight_map, as the index of a checkpoint has")
    by_file: dict[str, list[str]] = {}
    for name, file in places.items():
        # Plain names only: an index may be anybody's.
        if not isinstance(file, str) or Path(file).name != file:
            raise ExportError(f"{path}: tensor '{name}' is in {file!r}, which isn't a file beside the index")
        by_file.setdefault(file, []).append(name)
    return [(path.parent / file, names) for file, names in by_file.items()]


def _of_folder(folder: Path) -> Path:
    """The folder's index, else its only file of weights, else the folder: all of them."""
    for name in PREFERRED:
        for suffix in (INDEX_SUFFIX, ".safetensors"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise ExportError(
            f"{folder}: has {len(indexes)} indexes ({', '.join(path.name for path in indexes)}): name one"
        )
    if indexes:
        return indexes[0]
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        other = f"; {', '.join(pickled)} would have to be saved as one" if pickled else ""
        raise ExportError(f"{folder}: holds no safetensors file{other}")
    return folder
