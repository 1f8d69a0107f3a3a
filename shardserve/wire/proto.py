"""Proto tensors ↔ `TensorMeta` and bytes, not through numpy: Main hands the bytes of numbers on as they came."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from shardserve.errors import InvalidInput, shown
from shardserve.wire.frames import Buffer, Payload
from shardserve.wire.messages import TensorMeta
from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.tensors import BYTES, MAX_DIMS, NAMES, NUMBERS, STRING, check_meta, to_text, too_deep

MAX_MESSAGE = (1 << 31) - (1 << 20)
"""Bytes of instances in a message, which has 2 GiB at most. A larger one can't be written: gRPC's asyncio client then
sends an empty one, its other one raises what isn't ours."""

# Of what is around the values: field tags, lengths and the dtype of a tensor; a dim; a string of bytes_val.
PER_TENSOR, PER_DIM, PER_STRING = 64, 10, 6


def size_of(metas: Mapping[str, TensorMeta]) -> int:
    """Bytes that an instance takes in a message, or a few more."""
    return sum(
        meta.nbytes + 4 * len(name) + PER_TENSOR + PER_DIM * len(meta.shape) + PER_STRING * len(meta.lengths or ())
        for name, meta in metas.items()
    )


def from_tensor(tensor: pb.Tensor, where: str) -> tuple[TensorMeta, bytes]:
    """InvalidInput, naming `where`, if dtype, shape and sizes don't agree or a string isn't UTF-8."""
    name = NAMES.get(tensor.dtype)
    if name is None:
        raise InvalidInput(f"{where}: unknown dtype number {tensor.dtype}")
    dims = tensor.shape.dims
    if len(dims) > MAX_DIMS:
        raise too_deep(len(dims), where)
    shape = tuple(dims)
    if tensor.dtype in (STRING, BYTES):
        parts = list(tensor.bytes_val)
        data = b"".join(parts)
        meta = TensorMeta(name, shape, len(data), tuple(map(len, parts)))
        if tensor.dtype == STRING and not data.isascii():
            for part in parts:
                to_text(part, where)
        other: object = tensor.data
    else:
        data, other = tensor.data, tensor.bytes_val
        meta = TensorMeta(name, shape, len(data))
    if other:
        taken, wrong = ("data", "bytes_val") if meta.lengths is None else ("bytes_val", "data")
        raise InvalidInput(f"{where}: {name} has its values in {taken}, got some in {wrong}")
    check_meta(meta, where)
    return meta, data


def to_tensor(tensor: pb.Tensor, meta: TensorMeta, data: Buffer | Payload) -> None:
    """Fills an empty proto tensor; `data` holds what `meta` says."""
    tensor.dtype = NUMBERS[meta.dtype]  # type: ignore[assignment]
    tensor.shape.dims.extend(meta.shape)
    raw = bytes(data)
    if meta.lengths is None:
        tensor.data = raw
        return
    ends = list(itertools.accumulate(meta.lengths))
    tensor.bytes_val.extend([raw[end - length : end] for end, length in zip(ends, meta.lengths, strict=True)])


def from_instance(instance: pb.Instance, where: str) -> tuple[dict[str, TensorMeta], list[Buffer]]:
    """The tensors of an instance, in the order of the dict's keys."""
    metas: dict[str, TensorMeta] = {}
    buffers: list[Buffer] = []
    for name, tensor in instance.items.items():
        metas[name], data = from_tensor(tensor, f"{where}, input {shown(name)}")
        buffers.append(data)
    return metas, buffers


def to_instance(instance: pb.Instance, metas: Mapping[str, TensorMeta], parts: Sequence[Buffer | Payload]) -> None:
    """Fills an empty proto instance; `parts` in the order of the keys."""
    for (name, meta), part in zip(metas.items(), parts, strict=True):
        to_tensor(instance.items[name], meta, part)
