"""Writes a weights file tensor by tensor: never more than one of them is in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shardserve.errors import ExportError
from shardserve.shards.graph import dtype_name
from shardserve.shards.weights import DTYPES, bytes_of, pieces

ALIGNMENT = 64
"""Of the first tensor's bytes in the file, for those who map it."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name in the file → dtype and shape."""


def write_weights(path: Path, layout: Layout, tensor: Callable[[str], Tensor]) -> tuple[str, int]:
    """Writes a safetensors file; `tensor` is asked for each value once, when its turn has come.

    Gives the file's sha256 and the bytes of its tensors. ExportError for a dtype that the format doesn't have, or where
    a value isn't what `layout` says.
    """
    # The widest first: each begins at a multiple of its elements' size.
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, dict[str, object]] = {}
    at = 0
    for name in names:
        dtype, shape = layout[name]
        if dtype not in _NAMES:
            raise ExportError(f"tensor '{name}' is {dtype_name(dtype)}, which weights files can't hold")
        start, at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name in names:
            dtype, shape = layout[name]
            value = tensor(name)
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise ExportError(
                    f"tensor '{name}' is {dtype_name(value.dtype)} {list(value.shape)}, "
                    f"the graph has {dtype_name(dtype)} {list(shape)}"
                )
            for piece in pieces(bytes_of(value)):
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest(), at
