"""The JSON of REST requests and replies ↔ named values; what is wrong is InvalidInput with the JSON path."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from shardserve.errors import InvalidInput, MessageTooLarge, ShardserveError, shown
from shardserve.main.router import Decoded, check_count
from shardserve.main.servable import Result
from shardserve.wire import tensors
from shardserve.wire.messages import TensorMeta

TYPES = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}
"""Other names of dtypes, as MindSpore Serving's clients write them."""

OBJECTS = 2
"""Below the body itself: instances, and their base64 objects."""

ARRAYS, ARRAYS_OF_BYTE = 1 << 20, 4
"""So many JSON arrays, and so many more for each of its bytes, may an output be: one of shape [1000000000, 0] has no
byte, and would be a billion of them."""

TRUNCATED = "Input data was truncated"
HALF_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u)")
NEAR_END = 16
"""msgspec says the first, too, when it looks for the other half of the second beyond the body's last bytes."""

TOO_DEEP = "the body is nested too deeply"


def decode_request(body: bytes, dtypes: Mapping[str, str], max_instances: int) -> list[Decoded]:
    """The instances of a body. dtypes: what JSON numbers become, by input; without one, int32 and float32.

    InvalidInput if the body as a whole is wrong, MessageTooLarge for too many instances; an instance that is wrong is
    its own InvalidInput.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        half = HALF_PAIR.search(body, max(0, len(body) - NEAR_END)) if str(error) == TRUNCATED else None
        why = f"the escape {half[0].decode()} is half of a surrogate pair" if half else error
        raise InvalidInput(f"the body isn't JSON: {why}") from None
    except RecursionError:
        raise InvalidInput(TOO_DEEP) from None
    if not isinstance(document, dict) or "instances" not in document:
        raise InvalidInput('the body isn\'t an object with "instances"')
    try:
        keys = _keys(document, OBJECTS)
        if body.count(b":") != keys:
            _refuse_duplicates(body)
    except RecursionError:  # Neither goes as deep as the fast decoder.
        raise InvalidInput(TOO_DEEP) from None
    # Quotes of its keys alone: no strings.
    numbers = body.count(b'"') == 2 * keys and b"true" not in body and b"false" not in body
    instances = document["instances"]
    if isinstance(instances, dict):
        return [_instance(instances, dtypes, "instances", numbers)]
    if not isinstance(instances, list):
        raise InvalidInput("instances is neither an object nor an array of objects")
    check_count(len(instances), max_instances)
    return [_instance(instance, dtypes, f"instances[{index}]", numbers) for index, instance in enumerate(instances)]


def _keys(value: Any, depth: int) -> int:
    """How many keys the objects of a body have, down to those of base64 objects, or fewer: not every number is looked
    at, nor what is nested more deeply than an array can be. As each has a colon, a body with just as many colons has no
    key twice."""
    if type(value) is dict:
        return len(value) + sum(_keys(item, depth - 1) for item in value.values()) if depth else len(value)
    first, dims = value, 0
    while type(first) is list and first and dims < tensors.MAX_DIMS:
        first, dims = first[0], dims + 1
    if type(first) is not dict:
        return 0
    leaves: Iterable[Any] = (value,)
    for _ in range(dims):
        leaves = itertools.chain.from_iterable(item for item in leaves if type(item) is list)
    return sum(_keys(leaf, depth) for leaf in leaves if type(leaf) is dict)


def _refuse_duplicates(body: bytes) -> None:
    """Reads the body again, slowly, as there may be a key twice: the fast decoder takes the last one of them."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidInput(f"the body has an object with the key {name!r} twice")
            seen.add(name)

    # msgspec has checked the rest.
    json.loads(body, object_pairs_hook=check)


def _instance(instance: Any, dtypes: Mapping[str, str], path: str, numbers: bool) -> Decoded:
    if not isinstance(instance, dict):
        return InvalidInput(f"{path} isn't an object")
    try:
        values = {
            name: parse_value(value, f"{path}.{name}", dtypes.get(name), numbers) for name, value in instance.items()
        }
        return tensors.encode_instance(values, path)
    except InvalidInput as error:
        return error


def parse_value(value: Any, path: str, dtype: str | None, numbers: bool) -> tensors.Value:
    """A number, bool, string or base64 object (shape (1,)), or a nested rectangular array of them. numbers: there is
    neither bool nor string in it."""
    if numbers and isinstance(value, list) and (array := _plain_numbers(value, dtype)) is not None:
        return array
    shape, leaves, kinds = _flatten(value, path) if isinstance(value, list) else ((1,), [value], {type(value)})
    if kinds == {dict}:
        if not isinstance(value, list):
            return _from_base64(value, path)
        found = [_from_base64(leaf, _at(path, shape, index)) for index, leaf in enumerate(leaves)]
        if not all(isinstance(leaf, bytes) for leaf in found) and not all(isinstance(leaf, str) for leaf in found):
            raise InvalidInput(f"{path}: base64 objects in an array are all of type str or all of type bytes")
        return _objects(found, shape)
    if kinds == {str}:
        if dtype not in (None, "str"):
            raise InvalidInput(f"{path}: a string where {dtype} is expected")
        return _objects(leaves, shape)
    if dtype in ("str", "bytes") and kinds:
        raise InvalidInput(f"{path}: a number where {dtype} is expected")
    return _numbers(leaves, kinds, dtype, shape, lambda index: _at(path, shape, index) if type(value) is list else path)


def _plain_numbers(value: list[Any], dtype: str | None) -> npt.NDArray[Any] | None:
    """What `parse_value` gives for an array of numbers, in half the time; None where it has to look more closely.

    numpy would take a bool among numbers for one, and give all strings of an array the room of the longest.
    """
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # Ragged, or too deep.
        return None
    target = tensors.DTYPES.get(dtype or ("int32" if array.dtype.kind == "i" else "float32"))
    if target is None or array.dtype not in (np.int64, np.float64) or not array.size or array.ndim > tensors.MAX_DIMS:
        return None
    if target.numpy.kind in "iu":
        limits = np.iinfo(target.numpy)
        fits = array.dtype.kind == "i" and limits.min <= array.min() and array.max() <= limits.max
        return array.astype(target.numpy) if fits else None
    if target.numpy.kind == "b":
        return None
    # numpy takes integers that int64 can't hold for float64, too.
    if dtype is None and np.abs(array).max() >= 1 << 63:
        return None
    with np.errstate(over="ignore"):
        result = array.astype(np.float64).astype(target.numpy)
    return result if np.isfinite(result).all() else None


def _numbers(
    leaves: list[Any], kinds: set[type], dtype: str | None, shape: tuple[int, ...], path: Callable[[int], str]
) -> npt.NDArray[Any]:
    """path: that of a leaf."""

    def wrong(test: Any, text: str) -> InvalidInput:
        index = next(index for index, leaf in enumerate(leaves) if test(leaf))
        return InvalidInput(f"{path(index)}: {text}")

    if not kinds <= {bool, int, float}:
        raise wrong(
            lambda leaf: type(leaf) not in (bool, int, float), "neither number, bool nor string like the others"
        )
    if bool in kinds and len(kinds) > 1:
        raise wrong(lambda leaf: type(leaf) is not type(leaves[0]), "bools and numbers in one array")
    default = "bool" if kinds == {bool} else "int32" if kinds == {int} else "float32"
    target = (
        tensors.DTYPES[dtype or default].numpy
        if (dtype or default) in tensors.DTYPES
        else tensors.DTYPES[default].numpy
    )
    if not leaves:
        return np.zeros(shape, target)
    if (bool in kinds) != (target.kind == "b"):
        raise wrong(lambda _: True, f"a {'bool' if bool in kinds else 'number'} where {target.name} is expected")
    if target.kind in "iu":
        limits = np.iinfo(target)
        if float in kinds:
            raise wrong(lambda leaf: type(leaf) is float, f"a fraction where {target.name} is expected")
        if min(leaves) < limits.min or max(leaves) > limits.max:
            raise wrong(lambda leaf: not limits.min <= leaf <= limits.max, f"a number that {target.name} can't hold")
        return np.array(leaves, target).reshape(shape)
    try:
        wide = np.array(leaves, np.float64)
    except OverflowError:
        wide = np.array([_nearest(leaf) for leaf in leaves])
    with np.errstate(over="ignore"):
        array = wide.astype(target)
    if target.kind != "b" and not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise wrong(lambda leaf: leaf is leaves[index], f"a number that {target.name} can't hold")
    return array.reshape(shape)


def _nearest(number: int | float) -> float:
    """Infinity for an int that is larger than any float: numpy gives up on it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _flatten(value: list[Any], path: str) -> tuple[tuple[int, ...], list[Any], set[type]]:
    """Shape, leaves and their types of a nested array; InvalidInput at the first place that isn't rectangular.

    A body is mostly numbers: they are looked at in C, level by level, and once.
    """
    shape: tuple[int, ...] = (len(value),)
    level = value
    while list in (kinds := set(map(type, level))):
        if len(kinds) > 1 or len(set(map(len, level))) > 1:
            _refuse_ragged(level, path, shape)
        shape += (len(level[0]),)
        if len(shape) > tensors.MAX_DIMS:
            raise InvalidInput(f"{path}: nested more than {tensors.MAX_DIMS} deep")
        level = list(itertools.chain.from_iterable(level))
    return shape, level, kinds


def _refuse_ragged(level: list[Any], path: str, shape: tuple[int, ...]) -> NoReturn:
    sizes = [f"{len(item)} elements" if type(item) is list else "no array" for item in level]
    index = next(index for index, size in enumerate(sizes) if size != sizes[0])
    raise InvalidInput(
        f"{_at(path, shape, index)}: a ragged array: {sizes[index]}, where its first neighbour has {sizes[0]}"
    )


def _at(path: str, shape: tuple[int, ...], index: int) -> str:
    return path + "".join(f"[{place}]" for place in np.unravel_index(index, shape))


def _objects(values: list[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _from_base64(value: dict[str, Any], path: str) -> tensors.Value:
    encoded, name, shape = value.get("b64"), value.get("type", "bytes"), value.get("shape")
    if not isinstance(encoded, str) or not isinstance(name, str) or value.keys() - {"b64", "type", "shape"}:
        raise InvalidInput(f'{path}: an object isn\'t {{"b64": "…", "type": "…", "shape": […]}}')
    name = TYPES.get(name, name)
    if name not in tensors.NUMBERS:
        raise InvalidInput(
            f"{path}.type: unknown type {shown(name)}; known are {', '.join([*TYPES, *tensors.NUMBERS])}"
        )
    if shape is not None and not (isinstance(shape, list) and all(type(dim) is int and dim >= 0 for dim in shape)):
        raise InvalidInput(f"{path}.shape: not an array of sizes")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"{path}.b64: not base64: {error}") from None
    if name in ("str", "bytes"):
        if shape not in (None, [], [1]):
            raise InvalidInput(f"{path}.shape: one {name} has shape [1], got {shape}")
        return tensors.to_text(data, path) if name == "str" else data
    itemsize = tensors.DTYPES[name].itemsize
    if shape is None and len(data) % itemsize:
        raise InvalidInput(f"{path}.b64: {len(data)} bytes are no whole number of {name}")
    dims = (len(data) // itemsize,) if shape is None else tuple(shape)
    return tensors.decode(TensorMeta(name, dims, len(data)), data, path)


def encode_reply(results: Sequence[Result]) -> bytes:
    """Arrays become nested arrays, shape () a single value, str and bytes of shape (1,) too; bytes are base64 objects.

    JSON knows neither NaN nor infinity: they become null.
    """
    instances: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, ShardserveError):
            instances.append({"error_msg": str(result)})
        else:
            values = tensors.decode_instance(*result, where="output")
            instances.append({name: _to_json(value) for name, value in values.items()})
    return msgspec.json.encode({"instances": instances})


def arrays_of(shape: Sequence[int]) -> int:
    """How many JSON arrays a tensor of this shape is."""
    arrays, of_a_dim = 0, 1
    for dim in shape:
        arrays += of_a_dim
        of_a_dim *= dim
    return arrays


def writable(result: Result) -> Result:
    """The result, or the MessageTooLarge that is its place in a reply."""
    if isinstance(result, ShardserveError):
        return result
    for name, meta in result[0].items():
        if (arrays := arrays_of(meta.shape)) > ARRAYS + ARRAYS_OF_BYTE * meta.nbytes:
            return MessageTooLarge(
                f"output {name!r} of shape {list(meta.shape)} is {arrays} arrays in JSON; gRPC gives it as it is"
            )
    return result


def _to_json(value: tensors.Value) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode(), "type": "bytes"}
    if isinstance(value, np.ndarray):
        if value.dtype == tensors.DTYPES["bfloat16"].numpy:
            value = value.astype(np.float32)
        return _to_json(value.tolist()) if value.dtype == object else value.tolist()
    if isinstance(value, list) and value and isinstance(value[0], list | bytes):
        return [_to_json(item) for item in value]
    return value


def encode_error(error: ShardserveError) -> bytes:
    return msgspec.json.encode({"error_msg": str(error)})


def encode_health(ready: bool, states: Mapping[str, str]) -> bytes:
    return msgspec.json.encode({"ready": ready, "servables": states})
