import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from shardserve.errors import InvalidInput
from shardserve.wire import proto, tensors
from shardserve.wire.messages import TensorMeta
from shardserve.wire.stubs import ms_service_pb2 as pb

SHAPES = [(), (1,), (0,), (3,), (2, 0, 3), (2, 3, 4)]


def round_trip(value):
    meta, data = tensors.encode(value)
    return meta, tensors.decode(meta, bytearray(data))


def round_trip_proto(value):
    tensor = pb.Tensor()
    proto.to_tensor(tensor, *tensors.encode(value))
    meta, data = proto.from_tensor(pb.Tensor.FromString(tensor.SerializeToString()), "here")
    return meta, tensors.decode(meta, bytearray(data))


@pytest.mark.parametrize("through", [round_trip, round_trip_proto])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(tensors.DTYPES))
def test_numbers_come_back_bit_for_bit(name, shape, through):
    dtype = tensors.DTYPES[name].numpy
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, size, np.uint8)
    array = raw.view(dtype).reshape(shape)
    meta, back = through(array)
    assert (meta.dtype, meta.shape, meta.nbytes) == (name, shape, size)
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


@pytest.mark.parametrize("through", [round_trip, round_trip_proto])
@pytest.mark.parametrize("value", ["", "häuser", b"", b"\0\xff", 3, -1.5, True])
def test_single_values_have_shape_1(value, through):
    meta, back = through(value)
    assert meta.shape == (1,)
    assert back == value
    if isinstance(value, int | float):
        assert meta.dtype == {int: "int64", float: "float64", bool: "bool"}[type(value)]


@pytest.mark.parametrize("through", [round_trip, round_trip_proto])
@pytest.mark.parametrize("values", [["a", "", "ñ"], [b"", b"\0x", b"y"]])
def test_arrays_of_strings(values, through):
    array = np.array([values, values], object)
    meta, back = through(array)
    assert meta.shape == (2, 3)
    assert back.tolist() == array.tolist()
    assert tensors.encode(np.array(values))[0].dtype == ("str" if isinstance(values[0], str) else "bytes")
    assert through(np.empty((0, 2), object))[1].shape == (0, 2)


def test_what_is_not_contiguous_or_little_endian_is_put_in_order():
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    meta, back = round_trip(array)
    assert meta == TensorMeta("float32", (4, 3), 48)
    assert np.array_equal(back, array)


def test_a_mask_that_hides_nothing_is_none():
    _, data = tensors.encode(np.ma.masked_array([1.0, 2.0], [False, False]))
    assert bytes(data) == np.array([1.0, 2.0]).tobytes()


def test_a_contiguous_array_is_not_copied():
    array = np.zeros((4, 4), ml_dtypes.bfloat16)
    _, data = tensors.encode(array)
    array[0, 0] = 1
    assert np.frombuffer(data, ml_dtypes.bfloat16)[0] == 1
    assert np.shares_memory(tensors.decode(TensorMeta("bfloat16", (16,), 32), data), array)


def test_mindspore_numbers():
    numbers = {name: tensors.NUMBERS[name] for name in tensors.NUMBERS}
    for name, number in numbers.items():
        suffix = {"str": "STRING"}.get(name, name.upper())
        assert pb.DataType.Name(number) == f"MS_{suffix}"


@pytest.mark.parametrize(
    ("meta", "data", "text"),
    [
        (TensorMeta("float32", (2, 2), 12), bytes(12), r"float32 of shape \[2, 2\] is 16 bytes, got 12"),
        (TensorMeta("float32", (-1,), 4), bytes(4), "negative"),
        (TensorMeta("float32", (1,) * 33, 4), bytes(4), "a shape of 33 dims; at most 32"),
        (TensorMeta("float32", (-1,) * 1000, 4), bytes(4), "a shape of 1000 dims; at most 32"),
        (TensorMeta("float32", (0, 2**62, 2**62), 0), b"", "larger than any tensor can be"),
        (TensorMeta("float99", (1,), 4), bytes(4), "unknown dtype 'float99'"),
        (TensorMeta("float32", (1,), 4), bytes(8), "8 bytes came where 4"),
        (TensorMeta("str", (2,), 2, (2,)), b"ab", "2 elements, got 1"),
        (TensorMeta("str", (1,), 2, (3,)), b"ab", "elements of 3 bytes, got 2"),
        (TensorMeta("str", (2,), 2, (-1, 3)), b"ab", "elements of"),
        (TensorMeta("str", (1,), 1, (1,)), b"\xff", "isn't UTF-8"),
    ],
)
def test_what_does_not_fit_is_named(meta, data, text):
    with pytest.raises(InvalidInput, match=text) as caught:
        tensors.decode(meta, data, "input 'x'")
    assert str(caught.value).startswith("input 'x'")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2], "list is neither"),
        (None, "NoneType"),
        (np.array([1j]), "complex128"),
        (np.array(["2020"], "datetime64"), "datetime64"),
        (np.array(["a", b"b"], object), "only str or only bytes"),
        (2**63, "doesn't fit int64"),
        ("\ud800", "UTF-8"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "1 of 2 elements of the array are masked, which can't be sent"),
        (np.ma.masked, "1 of 1 elements"),
    ],
)
def test_what_can_not_be_sent_is_named(value, text):
    with pytest.raises(InvalidInput, match=text):
        tensors.encode(value, "input 'x'")


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (pb.Tensor(dtype=pb.MS_FLOAT32, data=bytes(8), shape=pb.TensorShape(dims=[3])), "is 12 bytes, got 8"),
        (pb.Tensor(dtype=pb.MS_FLOAT32, data=bytes(4), shape=pb.TensorShape(dims=[-1, -1])), "negative"),
        (pb.Tensor(data=bytes(4), shape=pb.TensorShape(dims=[1])), "unknown dtype number 0"),
        (
            pb.Tensor(dtype=pb.MS_FLOAT32, data=bytes(4), bytes_val=[b"a"], shape=pb.TensorShape(dims=[1])),
            "float32 has its values in data, got some in bytes_val",
        ),
        (
            pb.Tensor(dtype=pb.MS_BYTES, data=b"a", bytes_val=[b"a"], shape=pb.TensorShape(dims=[1])),
            "bytes has its values in bytes_val, got some in data",
        ),
        (pb.Tensor(dtype=pb.MS_STRING, bytes_val=[b"\xff"], shape=pb.TensorShape(dims=[1])), "UTF-8"),
        (pb.Tensor(dtype=pb.MS_BYTES, bytes_val=[b"a"], shape=pb.TensorShape(dims=[2])), "2 elements, got 1"),
    ],
)
def test_a_wrong_proto_tensor_is_named(tensor, text):
    with pytest.raises(InvalidInput, match=text):
        proto.from_tensor(tensor, "instance 0, input 'x'")


def test_strings_that_are_utf_8_only_together_are_refused():
    tensor = pb.Tensor(dtype=pb.MS_STRING, bytes_val=[b"a\xc3", b"\xb1"], shape=pb.TensorShape(dims=[2]))
    with pytest.raises(InvalidInput, match="UTF-8"):
        proto.from_tensor(tensor, "instance 0, input 'x'")


def test_a_whole_instance():
    values = {"x": np.ones((2, 2), np.float32), "name": "n", "empty": np.empty((0,), np.int8)}
    metas, buffers = tensors.encode_instance(values, "instance 0")
    back = tensors.decode_instance(metas, buffers, "instance 0")
    assert back.keys() == values.keys()
    assert np.array_equal(back["x"], values["x"])
    assert back["name"] == "n"


def test_an_array_is_encoded_without_the_import_of_numpy_ma():
    """It would be in the event loop of a server, with the first answer."""
    code = (
        "import sys; import numpy as np; from shardserve.wire import tensors; "
        "[tensors.encode(value) for value in (np.ones(3), np.float32(1), 2, 'a')]; sys.exit('numpy.ma' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
