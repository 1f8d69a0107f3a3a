import base64
import time
import tracemalloc

import ml_dtypes
import msgspec
import numpy as np
import pytest

from shardserve.errors import InvalidInput, MessageTooLarge, StepError
from shardserve.main.rest import codec
from shardserve.wire import tensors
from shardserve.wire.messages import TensorMeta


def b64(data):
    return base64.b64encode(data).decode()


def parse(value, dtype=None):
    body = msgspec.json.encode({"instances": {"x": value}})
    (instance,) = codec.decode_request(body, {"x": dtype} if dtype else {}, 1)
    if isinstance(instance, InvalidInput):
        raise instance
    return tensors.decode_instance(*instance, "x")["x"]


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (3, None, np.array([3], np.int32)),
        (2.5, None, np.array([2.5], np.float32)),
        (True, None, np.array([True])),
        ([1, 2.5], None, np.array([1, 2.5], np.float32)),
        ([0, 1, 0.5], None, np.array([0, 1, 0.5], np.float32)),
        ([-(2**63), 2**63 - 1], "int64", np.array([-(2**63), 2**63 - 1])),
        ([-1, 2**63], "float64", np.array([-1, 2**63], np.float64)),
        ([[1, 2], [3, 4]], None, np.array([[1, 2], [3, 4]], np.int32)),
        ([[[True]], [[False]]], None, np.array([[[True]], [[False]]])),
        ([], None, np.zeros((0,), np.float32)),
        ([[], []], None, np.zeros((2, 0), np.float32)),
        ([[], []], "int64", np.zeros((2, 0), np.int64)),
        (3, "float64", np.array([3.0])),
        ([1, 2], "int64", np.array([1, 2], np.int64)),
        ([0, 255], "uint8", np.array([0, 255], np.uint8)),
        ([2**64 - 1], "uint64", np.array([2**64 - 1], np.uint64)),
        ([1.5], "bfloat16", np.array([1.5], ml_dtypes.bfloat16)),
        ([1.5], "float16", np.array([1.5], np.float16)),
        ({"b64": b64(np.float32([1, 2]).tobytes()), "type": "fp32", "shape": [2, 1]}, None, np.float32([[1], [2]])),
        ({"b64": b64(np.float16([1, 2]).tobytes()), "type": "float16"}, None, np.float16([1, 2])),
        ({"b64": b64(np.float64(1).tobytes()), "type": "fp64", "shape": []}, None, np.array(1.0)),
        ({"b64": b64(b"\1\0"), "type": "bool"}, None, np.array([True, False])),
        ({"b64": b64(b"\x80\x3f"), "type": "bfloat16"}, None, np.array([1], ml_dtypes.bfloat16)),
    ],
)
def test_values_become_arrays(value, dtype, expected):
    array = parse(value, dtype)
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("häuser", ["häuser"]),
        (["a", "b"], ["a", "b"]),
        ([["a"], ["b"]], [["a"], ["b"]]),
        ([{"b64": b64(b"\xff"), "type": "bytes"}, {"b64": ""}], [b"\xff", b""]),
    ],
)
def test_strings_become_arrays_of_objects(value, expected):
    assert np.array(parse(value), object, ndmin=1).tolist() == expected


def test_one_base64_string_or_bytes_is_itself():
    assert parse({"b64": b64(b"\xff\0")}) == b"\xff\0"
    assert parse({"b64": b64("ñ".encode()), "type": "str", "shape": [1]}) == "ñ"


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        ([[1, 2], [3]], None, "instances.x[1]: a ragged array: 1 elements, where its first neighbour has 2 elements"),
        ([[1, 2], 3], None, "instances.x[1]: a ragged array: no array, where its first neighbour has 2 elements"),
        ([[[1], [2]], [[3], [4, 5]]], None, "instances.x[1][1]: a ragged array"),
        ([1, "a"], None, "instances.x[1]: neither number, bool nor string like the others"),
        ([1, None], None, "instances.x[1]: neither"),
        (None, None, "instances.x: neither"),
        ([True, 1], None, "instances.x[1]: bools and numbers"),
        ([[1, 2], [3, 2**31]], None, "instances.x[1][1]: a number that int32 can't hold"),
        ([-1, 2**63], None, "instances.x[1]: a number that int32 can't hold"),
        (-1, "uint8", "instances.x: a number that uint8 can't hold"),
        ([1, 1.5], "int64", "instances.x[1]: a fraction where int64 is expected"),
        ([1, 1e39], None, "instances.x[1]: a number that float32 can't hold"),
        ([1.5, 10**400], "float64", "instances.x[1]: a number that float64 can't hold"),
        ([-(10**400)], "float32", "instances.x[0]: a number that float32 can't hold"),
        ([True], "int64", "instances.x[0]: a bool where int64 is expected"),
        (True, "int64", "instances.x: a bool where int64 is expected"),
        ([[300]], "uint8", "instances.x[0][0]: a number that uint8 can't hold"),
        ([1.5], "int32", "instances.x[0]: a fraction where int32 is expected"),
        ([None], None, "instances.x[0]: neither"),
        (1, "bool", "instances.x: a number where bool is expected"),
        ("a", "float32", "instances.x: a string where float32 is expected"),
        (1, "str", "instances.x: a number where str is expected"),
        ({"b64": "AA==", "type": "int99"}, None, "instances.x.type: unknown type 'int99'"),
        ({"b64": "A", "type": "int8"}, None, "instances.x.b64: not base64"),
        ({"b64": "ÄÄ==", "type": "int8"}, None, "instances.x.b64: not base64"),
        ({"b64": "AAA=", "type": "int32"}, None, "instances.x.b64: 2 bytes are no whole number of int32"),
        ({"b64": "AAA=", "type": "int8", "shape": [3]}, None, "instances.x: int8 of shape [3] is 3 bytes, got 2"),
        ({"b64": "AAA=", "type": "int8", "shape": [-2]}, None, "instances.x.shape: not an array of sizes"),
        ({"b64": "AAA=", "type": "int8", "shape": [True]}, None, "instances.x.shape: not an array of sizes"),
        ({"b64": "AAA=", "shape": [2]}, None, "instances.x.shape: one bytes has shape [1]"),
        ({"b64": "/w==", "type": "str"}, None, "instances.x: a string that isn't UTF-8"),
        (
            {"b64": "", "type": "int8", "shape": [0, 2**62]},
            None,
            "instances.x: shape [0, 4611686018427387904] is larger",
        ),
        ({"data": 1}, None, "instances.x: an object isn't"),
        ([{"b64": "", "type": "str"}, {"b64": ""}], None, "all of type str or all of type bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(value, dtype, text):
    with pytest.raises(InvalidInput) as caught:
        parse(value, dtype)
    assert str(caught.value).startswith(text) or text in str(caught.value)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "the body isn't JSON"),
        (b'{"instances": [1,', "the body isn't JSON"),
        (b'{"instances": \xff}', "the body isn't JSON"),
        (b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body is nested too deeply"),
        (b'{"instances": {"x": ' + b"9" * 10_000 + b"}}", "the body isn't JSON: Integer value out of range"),
        (rb'{"instances":[{"text":"\ud800"}]}', r"the body isn't JSON: the escape \\ud800 is half of a surrogate pair"),
        (rb'{"instances":[{"text":"\ud800 and more"}]}', "the body isn't JSON: .* surrogate pair"),
        (b"[1]", 'the body isn\'t an object with "instances"'),
        (b'{"instance": {}}', 'the body isn\'t an object with "instances"'),
        (b'{"instances": 1}', "instances is neither"),
    ],
)
def test_a_body_that_is_wrong(body, text):
    with pytest.raises(InvalidInput, match=text):
        codec.decode_request(body, {}, 10)


@pytest.mark.parametrize("inner", [b'"a:b"', b'{"a": 1}', b'{"a:": 1}', b'{"b64": ":"}'])
@pytest.mark.parametrize("depth", [*range(40, 950, 100), *range(950, 1010)])
def test_a_body_of_any_depth_is_read_or_refused(inner, depth):
    # Each of those that look at it comes to its end at another depth.
    body = b'{"instances": {"x": ' + b"[" * depth + inner + b"]" * depth + b"}}"
    with pytest.raises(InvalidInput, match=r"nested (too deeply|more than 32 deep)$"):
        raise codec.decode_request(body, {}, 10)[0]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"instances": {"x": 1}, "instances": {"x": 2}}', "instances"),
        (b'{"instances": {"x": 1, "x": 2}}', "x"),
        (b'{"instances": {"x": 1, "\\u0078": 2}}', "x"),
        (b'{"instances": [{"x": 1}, {"x": [1], "y": 2, "x": "a:b"}]}', "x"),
        (b'{"instances": [{"x": {"b64": "", "b64": "AA=="}}]}', "b64"),
        (b'{"instances": [{"x": [{"b64": ""}, {"b64": "", "type": "str", "type": "bytes"}]}]}', "type"),
        (b'{"instances": [{"x": [[1], {"y": 1, "y": 2}]}]}', "y"),
    ],
)
def test_a_key_that_is_there_twice_is_named(body, key):
    with pytest.raises(InvalidInput, match=f"^the body has an object with the key '{key}' twice$"):
        codec.decode_request(body, {}, 10)


def test_of_many_keys_one_that_is_there_twice_is_found_in_linear_time():
    keys = ",".join(f'"{number}":0' for number in range(1 << 15))
    body = f'{{"instances": {{{keys}, "32767": 0}}}}'.encode()
    began = time.process_time()
    with pytest.raises(InvalidInput, match="the key '32767' twice"):
        codec.decode_request(body, {}, 1)
    assert time.process_time() - began < 1


def test_keys_under_many_arrays_are_looked_for_in_linear_time():
    deep = "[" * 480 + "{}" + "]" * 480
    body = f'{{"instances": {{"x": [{",".join([deep] * 500)}]}}}}'.encode()
    began = time.process_time()
    [error] = codec.decode_request(body, {}, 1)
    assert str(error) == "instances.x: nested more than 32 deep"
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "instance",
    [
        {"x": "a:b"},
        {"a:b": [[1, 2], [3, 4]]},
        {"x": [[{"b64": "YQ=="}], [{"b64": "Yg=="}]]},
        {"x": [], "y": '"::"'},
        {},
    ],
)
def test_colons_and_objects_are_no_keys_twice(instance):
    body = msgspec.json.encode({"instances": [instance, instance]})
    for decoded in codec.decode_request(body, {}, 10):
        assert decoded[0].keys() == instance.keys()


def test_an_instance_that_is_wrong_leaves_the_others():
    body = msgspec.json.encode({"instances": [{"x": 1}, {"x": [[1], 2]}, 3, {"x": 2}]})
    first, second, third, fourth = codec.decode_request(body, {"x": "int64"}, 10)
    assert first[0]["x"].dtype == fourth[0]["x"].dtype == "int64"
    assert str(second).startswith("instances[1].x[1]: a ragged array")
    assert str(third) == "instances[2] isn't an object"


def test_what_is_nested_too_deeply_is_named():
    value = 1
    for _ in range(33):
        value = [value]
    with pytest.raises(InvalidInput, match=r"instances\.x: nested more than 32 deep"):
        parse(value)
    assert parse(value[0]).shape == (1,) * 32


@pytest.mark.parametrize(
    ("shape", "arrays"), [((1 << 40, 0), 1 + (1 << 40)), ((1000, 1000, 10, 0), 11_001_001), ((1 << 20, *[1] * 31), 0)]
)
def test_an_output_of_more_arrays_than_bytes_is_refused(shape, arrays):
    metas = {"y": TensorMeta("uint8", shape, int(np.prod(shape)))}
    arrays = arrays or 1 + 31 * shape[0]
    refused = codec.writable((metas, []))
    assert isinstance(refused, MessageTooLarge)
    assert str(refused).startswith(f"output 'y' of shape {list(shape)} is {arrays} arrays in JSON")


@pytest.mark.parametrize("shape", [(), (0,), (0, 1 << 40), (1_000_000, 0), (1 << 24, 1, 1)])
def test_an_output_of_few_arrays_is_written(shape):
    result = {"y": TensorMeta("uint8", shape, int(np.prod(shape)))}, []
    assert codec.writable(result) is result


def test_replies():
    values = {
        "scalar": np.array(2.5, np.float32),
        "one": np.array([7], np.int64),
        "half": np.array([[1.5], [2]], ml_dtypes.bfloat16),
        "flag": np.array([True]),
        "text": "ñ",
        "texts": np.array(["a", "b"], object),
        "raw": b"\xff",
        "raws": np.array([b"a", b"b"], object),
        "none": np.zeros((0, 2), np.int8),
        "nan": np.array([np.nan], np.float32),
    }
    metas, parts = tensors.encode_instance(values, "instance 0")
    body = codec.encode_reply([(metas, parts), StepError("id 9 is out of range")])
    assert msgspec.json.decode(body) == {
        "instances": [
            {
                "scalar": 2.5,
                "one": [7],
                "half": [[1.5], [2.0]],
                "flag": [True],
                "text": "ñ",
                "texts": ["a", "b"],
                "raw": {"b64": "/w==", "type": "bytes"},
                "raws": [{"b64": "YQ==", "type": "bytes"}, {"b64": "Yg==", "type": "bytes"}],
                "none": [],
                "nan": [None],
            },
            {"error_msg": "id 9 is out of range"},
        ]
    }


def test_a_body_that_is_not_utf_8():
    with pytest.raises(InvalidInput, match="the body isn't JSON"):
        codec.decode_request(b'{"instances": {"\xe9": 1}}', {}, 10)


@pytest.mark.timeout(10)
def test_a_body_of_many_instances_is_searched_once():
    """Once for each of them, these 8 MB took a minute."""
    instances = [{"x": [0, 1, *range(1000)]} for _ in range(4096)]
    decoded = codec.decode_request(msgspec.json.encode({"instances": instances}), {}, 4096)
    assert len(decoded) == 4096


def test_strings_take_their_own_room_each():
    body = msgspec.json.encode({"instances": {"x": [*["ab"] * 10_000, "x" * 60_000]}})
    tracemalloc.start()
    try:
        codec.decode_request(body, {}, 1)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
