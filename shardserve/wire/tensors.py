"""numpy arrays, numbers, str and bytes ↔ `TensorMeta` and raw bytes: what client, Main and Worker share.

Arrays that come out are views of the buffer given, without a copy: writable if the buffer is. A frame's payload is,
unless it came in shared memory; the client copies once, for protobuf's bytes are immutable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardserve.errors import InvalidInput
from shardserve.wire.frames import Buffer, Payload
from shardserve.wire.messages import TensorMeta

Value = Any
"""What users hand in and get: a numpy array, number, bool, str or bytes."""


class Dtype(NamedTuple):
    """A dtype of numbers: its name, its number in MindSpore Serving's protocol, bytes an element, numpy's dtype."""

    name: str
    number: int
    itemsize: int
    numpy: np.dtype[Any]


def _numbers() -> dict[str, Dtype]:
    names = [
        "bool",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
    table = {name: np.dtype(name) for name in names}
    numbered = {name: (position, dtype) for position, (name, dtype) in enumerate(table.items(), start=1)}
    numbered["bfloat16"] = (15, np.dtype(ml_dtypes.bfloat16))
    return {name: Dtype(name, number, dtype.itemsize, dtype) for name, (number, dtype) in numbered.items()}


STRING, BYTES = 13, 14
MAX_DIMS = 32
"""numpy 1's limit; later ones and torch allow 64."""
MAX_ELEMENTS = 1 << 59
"""So that 8 bytes an element stay within a signed 64-bit size."""
DTYPES: dict[str, Dtype] = _numbers()
# A look at a numpy dtype's name takes 10 us.
_BY_NUMPY: dict[np.dtype[Any], Dtype] = {dtype.numpy: dtype for dtype in DTYPES.values()}
NAMES: dict[int, str] = {dtype.number: dtype.name for dtype in DTYPES.values()} | {STRING: "str", BYTES: "bytes"}
NUMBERS: dict[str, int] = {name: number for number, name in NAMES.items()}


def too_deep(dims: int, where: str) -> InvalidInput:
    return InvalidInput(f"{where}: a shape of {dims} dims; at most {MAX_DIMS} are possible")


def elements(shape: Sequence[int], where: str) -> int:
    """How many elements a shape has; InvalidInput for one that no array can have (negative, too large, too deep)."""
    if len(shape) > MAX_DIMS:  # First: there may be millions of them.
        raise too_deep(len(shape), where)
    if any(dim < 0 for dim in shape):
        raise InvalidInput(f"{where}: shape {list(shape)} has a negative dim")
    # An empty tensor, too: numpy multiplies the other dims.
    if math.prod(max(dim, 1) for dim in shape) > MAX_ELEMENTS:
        raise InvalidInput(f"{where}: shape {list(shape)} is larger than any tensor can be")
    return math.prod(shape)


def check_meta(meta: TensorMeta, where: str) -> None:
    """InvalidInput, naming `where`, if dtype, shape, byte size and lengths don't agree."""
    count = elements(meta.shape, where)
    dtype = DTYPES.get(meta.dtype)
    if dtype is not None:
        if meta.nbytes != count * dtype.itemsize:
            wanted = count * dtype.itemsize
            raise InvalidInput(
                f"{where}: {meta.dtype} of shape {list(meta.shape)} is {wanted} bytes, got {meta.nbytes}"
            )
    elif meta.dtype in ("str", "bytes"):
        lengths = meta.lengths or ()
        if len(lengths) != count:
            raise InvalidInput(f"{where}: shape {list(meta.shape)} has {count} elements, got {len(lengths)}")
        if min(lengths, default=0) < 0 or sum(lengths) != meta.nbytes:
            raise InvalidInput(f"{where}: elements of {sum(lengths)} bytes, got {meta.nbytes}")
    else:
        raise InvalidInput(f"{where}: unknown dtype {meta.dtype!r}")


def encode(value: Value, where: str = "value") -> tuple[TensorMeta, Buffer]:
    """A value's description and its bytes, not copied if it is a C-contiguous little-endian array.

    Python numbers become int64, float64 or bool; those, str and bytes get shape (1,). Arrays of str (dtype U, or object
    with str) and bytes (S, or object with bytes) go element by element. InvalidInput for what has no dtype here, and
    for arrays of which something is masked.
    """
    if isinstance(value, str | bytes):
        return _encode_strings([value], (1,), where)
    if isinstance(value, bool | int | float):
        try:
            kind = np.bool_ if isinstance(value, bool) else np.int64 if isinstance(value, int) else np.float64
            value = np.array([value], kind)
        except OverflowError:
            raise InvalidInput(f"{where}: {value} doesn't fit int64") from None
    if not isinstance(value, np.ndarray | np.generic):
        raise InvalidInput(f"{where}: {type(value).__name__} is neither a numpy array nor a number, str or bytes")
    # Of a subclass only: to ask imports numpy.ma, which took a server's first answer 30 ms, and descriptors.
    of_subclass = type(value) is not np.ndarray and not isinstance(value, np.generic)
    if of_subclass and isinstance(value, np.ma.MaskedArray) and (hidden := np.count_nonzero(value.mask)):
        raise InvalidInput(
            f"{where}: {hidden} of {value.size} elements of the array are masked, which can't be sent; .filled(value) "
            "puts a value in their places"
        )
    array = np.asarray(value)
    dtype = _BY_NUMPY.get(array.dtype)
    if dtype is None and array.dtype.kind in "USO":
        return _encode_strings(array.reshape(-1).tolist(), array.shape, where)
    dtype = dtype or DTYPES.get(array.dtype.name)  # Of the other byte order, for one.
    if dtype is None:
        raise InvalidInput(f"{where}: dtype {array.dtype} can't be sent; known are {', '.join(NUMBERS)}")
    # Not np.ascontiguousarray, which makes an array of shape () one of shape (1,).
    array = np.asarray(array, dtype=dtype.numpy, order="C")
    return TensorMeta(dtype.name, array.shape, array.nbytes), as_bytes(array)


def as_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The memory of a C-contiguous array; bfloat16, which has no buffer format, goes through uint8."""
    return memoryview(cast(Any, array.reshape(-1).view(np.uint8)))


def decode(meta: TensorMeta, data: Buffer | Payload, where: str = "value") -> Value:
    """The value that `meta` and `data` describe: an array that is a view of `data`.

    One str or bytes of shape () or (1,) comes back as such, several as an array of dtype object.
    """
    dtype = DTYPES.get(meta.dtype)
    size = data.nbytes if isinstance(data, memoryview | np.ndarray) else len(data)
    if (
        dtype is not None
        and size == meta.nbytes > 0
        and min(meta.shape, default=0) >= 0
        and len(meta.shape) <= MAX_DIMS
    ):
        # The fast way: numpy refuses what else can be wrong with a tensor that isn't empty, and what it was is found
        # below.
        with contextlib.suppress(ValueError):
            return np.frombuffer(cast(Buffer, data), dtype.numpy).reshape(meta.shape)
    check_meta(meta, where)
    if size != meta.nbytes:
        raise InvalidInput(f"{where}: {size} bytes came where {meta.nbytes} were announced")
    if dtype is not None:
        return np.frombuffer(cast(Buffer, data), dtype.numpy).reshape(meta.shape)
    raw = bytes(cast(Buffer, data))
    values: list[str | bytes] = []
    at = 0
    for length in meta.lengths or ():
        element = raw[at : at + length]
        values.append(to_text(element, where) if meta.dtype == "str" else element)
        at += length
    if meta.shape in ((), (1,)):
        return values[0]
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(meta.shape)


def encode_instance(values: Mapping[str, Value], where: str) -> tuple[dict[str, TensorMeta], list[Buffer]]:
    """`encode` for each named value of an instance, in the order of its keys, as the frames want it."""
    metas: dict[str, TensorMeta] = {}
    buffers: list[Buffer] = []
    for name, value in values.items():
        metas[name], buffer = encode(value, f"{where}, {name!r}")
        buffers.append(buffer)
    return metas, buffers


def decode_instance(metas: Mapping[str, TensorMeta], parts: Sequence[Buffer | Payload], where: str) -> dict[str, Value]:
    """`decode` for each tensor of an instance; `parts` in the order of the keys."""
    pairs = zip(metas.items(), parts, strict=True)
    return {name: decode(meta, part, f"{where}, {name!r}") for (name, meta), part in pairs}


def to_text(element: bytes, where: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: a string that isn't UTF-8 ({error.reason} at byte {error.start})") from None


def _encode_strings(values: list[Any], shape: tuple[int, ...], where: str) -> tuple[TensorMeta, Buffer]:
    if all(isinstance(value, str) for value in values):
        name = "str"
        try:
            parts = [value.encode() for value in values]
        except UnicodeEncodeError as error:
            raise InvalidInput(f"{where}: a string that can't be UTF-8: {error.reason}") from None
    elif all(isinstance(value, bytes) for value in values):
        name, parts = "bytes", values
    else:
        kinds = sorted({type(value).__name__ for value in values})
        raise InvalidInput(f"{where}: an array of objects holds only str or only bytes, got {', '.join(kinds)}")
    lengths = tuple(map(len, parts))
    return TensorMeta(name, shape, sum(lengths), lengths), b"".join(parts)
