"""The graph file of a shard: JSON of nodes over an allow-list of operators. No code, no pickle, nothing evaluated.

An argument is a JSON number, string, boolean, null or list of arguments, or an object with one key:
`{"node": name}` another node's result, `{"expr": text}` an integer over the dims, `{"dtype": "float32"}`,
`{"device": "self"}` the device that the shard runs on, `{"layout": "strided"}`, `{"memory_format": name}`,
`{"float": "inf" | "-inf" | "nan"}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from shardserve.errors import ShardError
from shardserve.shards import files
from shardserve.shards.config import DTYPES, check_version
from shardserve.shards.expressions import MAX_INTEGER, ExpressionError, parse

Shape = tuple[int | str, ...]

MAX_NESTING = 8  # of lists in an argument; operators take lists of numbers or of tensors

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in (*sorted(DTYPES), "complex64", "complex128")}
_MEMORY_FORMATS: dict[str, torch.memory_format] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_NON_FINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True)
class Ref:
    """An argument: the result of the node, input or parameter of this name."""

    name: str


@dataclass(frozen=True)
class Size:
    """An argument: an integer, as an expression over the dims."""

    text: str


@dataclass(frozen=True)
class Device:
    """An argument: the device that the shard runs on."""


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight or constant: `name` in the graph, `tensor` in the weights file (tied weights share one)."""

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A buffer that steps change. name: in the graph, what it was before the step. tensor: in the model; subgraphs of
    one export that name it alike share it. update: the node, input or parameter that it is after the step; None where
    this graph only reads it. fill: the value of all its elements at first; None: the weights file has them as `tensor`.
    """

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    update: str | None
    fill: bool | int | float | None


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One call, arguments encoded. A collective has the shape and dtype of the tensor that it is given."""

    name: str
    op: str
    args: list[Any]
    kwargs: dict[str, Any] = {}
    shape: Shape | None = None
    dtype: str | None = None


class GraphFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard's program: nodes in the order of execution; `inputs` and `outputs` in the group config's order."""

    format_version: int
    export_id: str
    dims: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    state: tuple[State, ...] = ()

    def encode(self) -> bytes:
        """The file's content."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def decode(cls, content: bytes, source: str) -> GraphFile:
        """The graph in a file's content; ShardError begins with `source`."""
        decoded = files.decode_json(content, source)
        check_version(decoded, source)
        try:
            return msgspec.convert(decoded, cls)
        except msgspec.ValidationError as error:
            raise ShardError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> GraphFile:
        """Read a graph file; ShardError names it and what is wrong."""
        return cls.decode(files.read(path, files.GRAPH_LIMIT), str(path))


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def to_dtype(name: Any) -> torch.dtype:
    """torch.float32 for "float32"."""
    try:
        return _DTYPES[name]
    except (KeyError, TypeError):
        raise ShardError(f"unknown dtype {name!r}") from None


def encode_argument(value: Any) -> Any:
    """The JSON form of an argument; TypeError for a value that has none."""
    if isinstance(value, (list, tuple)):
        return [encode_argument(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"node": value.name}
    if isinstance(value, Size):
        return {"expr": value.text}
    if isinstance(value, (Device, torch.device)):
        return {"device": "self"}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": dtype_name(value)}  # type: ignore[arg-type]
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    raise TypeError(f"{type(value).__name__} {value!r}")


def decode_argument(value: Any, depth: int = 0) -> Any:
    """The argument that `encode_argument` encoded; ShardError for anything else."""
    if isinstance(value, list):
        if depth == MAX_NESTING:
            raise ShardError(f"an argument of lists nested deeper than {MAX_NESTING}")
        return [decode_argument(item, depth + 1) for item in value]
    if isinstance(value, int) and not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
        raise ShardError(f"the argument {value} is too large")
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "node" and isinstance(content, str):
            return Ref(content)
        if kind == "expr" and isinstance(content, str):
            try:
                parse(content)
            except ExpressionError as error:
                raise ShardError(str(error)) from error
            return Size(content)
        if kind == "dtype":
            return to_dtype(content)
        if kind == "device" and content == "self":
            return Device()
        if kind == "float" and isinstance(content, str) and content in _NON_FINITE:
            return float(content)
        if kind == "memory_format" and isinstance(content, str) and content in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[content]
        if kind == "layout" and content == "strided":
            return torch.strided
    raise ShardError(f"{shortened(value)} is not an argument")


def shortened(value: Any) -> str:
    """What a file holds, as a message can quote it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
