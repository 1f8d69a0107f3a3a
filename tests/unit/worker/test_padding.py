"""Instances of different length in one batch."""

import numpy as np
import pytest

from shardserve.errors import ConfigError, InvalidInput
from shardserve.servable import declare_distributed, declaring
from shardserve.worker.answer import Answer
from shardserve.worker.calls import Call

from .test_batching import batching, payload, same

INPUTS = ["ids int64 batch length", "mask float32 batch length"]
OUTPUTS = ["y float32 batch length 2", "pooled float32 batch 2"]
PAD = {"ids": (0, 7), "mask": (0, 0.0)}


def padded(inputs=INPUTS, outputs=OUTPUTS, conditions=(), pad=PAD, size=None, **dims):
    with declaring("texts"):
        declared = declare_distributed(1, 1, pad=pad)
    model = {"pad": declared.pad, "max_batch_size": size}
    return batching(inputs, outputs, conditions, model, **({"batch": (1, 8), "length": (2, 16)} | dims))


@pytest.fixture
def call():
    def make(batches, length):
        arrays = (np.arange(length), np.ones(length, np.float32))
        return Call(arrays, batches.key(arrays), None, Answer(), lengths=batches.lengths(arrays))

    return make


def test_a_batch_has_the_greatest_length_and_each_output_its_own(call):
    batches = padded()
    calls = [call(batches, length) for length in (3, 5, 4)]
    assert len({c.key for c in calls}) == 1
    batch = batches.make_batch(calls)
    assert batch.dims == {"batch": 3, "length": 5}
    ids, mask = batch.arrays
    same(ids, np.array([[0, 1, 2, 7, 7], [0, 1, 2, 3, 4], [0, 1, 2, 3, 7]]))
    same(mask, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32))
    y, pooled = np.arange(30, dtype=np.float32).reshape(3, 5, 2), np.arange(6, dtype=np.float32).reshape(3, 2)
    for i, (own, whole) in enumerate(batches.split_batch(batch, payload(y, pooled))):
        same(own, y[i, : len(calls[i].arrays[0])])
        same(whole, pooled[i])


def test_equal_lengths_are_not_padded(call):
    batches = padded()
    batch = batches.make_batch([call(batches, 4), call(batches, 4)])
    assert batch.dims == {"batch": 2, "length": 4}


def test_to_a_multiple_and_no_further_than_the_export_takes(call):
    batches = padded(pad={"ids": (0, 7, 4), "mask": (0, 0, 4)}, length=(2, 14))
    for length, expected in ((3, 4), (4, 4), (5, 8), (13, 14), (14, 14)):
        assert batches.make_batch([call(batches, length)]).dims["length"] == expected


def test_shorter_than_the_export_takes(call):
    batches = padded(outputs=["y float32 batch length-1"])
    for length in (0, 1):
        batch = batches.make_batch([call(batches, length)])
        assert batch.dims == {"batch": 1, "length": 2}
        [(y,)] = batches.split_batch(batch, payload(np.array([[5]], np.float32)))
        assert y.shape == (0,)


def test_longer_than_the_export_takes(call):
    with pytest.raises(InvalidInput, match=r"input 'ids' must have a size of 0 to 16 at axis 0 \('length'\), got 17"):
        call(padded(), 17)


def test_lengths_of_one_instance_agree():
    with pytest.raises(InvalidInput, match=r"input 'mask' must have size 3 at axis 0"):
        padded().key([np.zeros(3, np.int64), np.zeros(4, np.float32)])
    with pytest.raises(InvalidInput, match=r"input 'ids' must have shape \[length\], got \[3, 1\]"):
        padded().key([np.zeros((3, 1), np.int64), np.zeros(3, np.float32)])


def test_outputs_of_derived_length(call):
    batches = padded(outputs=["y float32 batch 2*length", "z int64 batch (length+1)//2 3"])
    calls = [call(batches, length) for length in (3, 6)]
    batch = batches.make_batch(calls)
    y, z = np.arange(24, dtype=np.float32).reshape(2, 12), np.arange(18).reshape(2, 3, 3)
    [(y0, z0), (y1, z1)] = batches.split_batch(batch, payload(y, z))
    same(y0, y[0, :6])
    same(z0, z[0, :2])
    same(y1, y[1])
    same(z1, z[1])


def test_an_output_whose_size_is_derived_from_a_padded_dim_is_named(caplog):
    padded()
    assert caplog.text == ""
    padded(outputs=["y float32 batch length", "z float32 batch 3 2*length", "w float32 batch 2*other"], other=(1, 9))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "pad: output z[batch, 3, 2*length] has the size 2*length, which is derived from a padded dim: an instance gets "
        "the first elements of the padded output, as many as its own length gives. They have to be what it would get "
        "alone, as they aren't of torch.cat([x, x], 1), where padding lies between them"
    )


def test_a_static_length(call):
    batches = padded(
        ["ids int64 batch 6", "mask float32 batch 6"], ["pooled float32 batch 2"], pad={"ids": (0, 9), "mask": (0, 0)}
    )
    batch = batches.make_batch([call(batches, 4), call(batches, 6)])
    assert [array.shape for array in batch.arrays] == [(2, 6), (2, 6)]
    same(batch.arrays[0][0], np.array([0, 1, 2, 3, 9, 9]))
    with pytest.raises(InvalidInput, match="must have a size of 0 to 6 at axis 0"):
        call(batches, 7)


def test_near_lengths_share_a_batch_and_the_first_is_always_in_it(call):
    batches = padded(size=3, length=(2, 200))
    calls = [call(batches, length) for length in (50, 100, 51, 10, 52, 49)]
    assert [c.lengths[0] for c in batches.choose(calls)] == [50, 51, 49]
    few = [call(batches, length) for length in (100, 40, 60)]
    assert [c.lengths[0] for c in batches.choose(few)] == [100, 60]


def test_under_conditions_only_equal_sizes_share_a_batch(call):
    batches = padded(conditions=("length % 2 == 0",), pad={"ids": (0, 7, 4), "mask": (0, 0, 4)})
    assert call(batches, 3).key == call(batches, 4).key != call(batches, 5).key


def test_infinity_is_of_any_floating_dtype():
    batches = padded(["x float16 batch length"], ["y float16 batch length"], pad={"x": (0, -np.inf)})
    arrays = [np.ones(length, np.float16) for length in (2, 3)]
    calls = [Call((x,), batches.key([x]), None, Answer(), lengths=batches.lengths([x])) for x in arrays]
    same(batches.make_batch(calls).arrays[0], np.array([[1, 1, -np.inf], [1, 1, 1]], np.float16))


def test_two_dims(call):
    batches = padded(
        ["image float32 batch 1 h w"], ["mask float32 batch h w"], pad={"image": (1, 0.0)}, h=(1, 9), w=(1, 9)
    )
    a, b = np.ones((1, 2, 3), np.float32), np.ones((1, 4, 3), np.float32)
    assert batches.key([a]) == batches.key([b]) != batches.key([np.ones((1, 4, 4), np.float32)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pad": {"idz": (0, 0)}}, r"pad=\{'idz': …\}: the model's inputs with a batch dim are ids, mask"),
        ({"pad": {"ids": (1, 0), "mask": (0, 0)}}, r"pad=\{'ids': …\}: an instance of \[length\] has no dim 1"),
        ({"pad": {"ids": (0, 0.5), "mask": (0, 0)}}, r"pad=\{'ids': …\}: 0.5 is no int64"),
        ({"pad": {"ids": (0, 2**63), "mask": (0, 0)}}, r"9223372036854775808 is no int64"),
        ({"pad": {"ids": (0, 0), "mask": (0, 10**400)}}, r"pad=\{'mask': …\}: 10{400} is no float32"),
        (
            {"inputs": ["x float16 batch length"], "outputs": ["y float16 batch length"], "pad": {"x": (0, -1e9)}},
            r"pad=\{'x': …\}: -1000000000.0 is no float16",
        ),
        (
            {
                "inputs": ["x bfloat16 batch length"],
                "outputs": ["y bfloat16 batch length"],
                "pad": {"x": (0, float(np.finfo(np.float32).min))},
            },
            r"pad=\{'x': …\}: -3.4028234663852886e\+38 is no bfloat16",
        ),
        ({"pad": {"ids": (0, 0)}}, r"dim length is padded, but input 'mask' has it at dim 0 and isn't"),
        ({"pad": {"ids": (0, 0, 4), "mask": (0, 0)}}, r"pad=\{'mask': …\}: dim length is padded to another multiple"),
        ({"inputs": ["ids int64 batch 2*length"], "pad": {"ids": (0, 0)}}, r"is exported as 2\*length"),
        ({"inputs": ["ids int64 batch 6"], "outputs": ["y int64 batch 6"], "pad": {"ids": (0, 0)}}, r"fixed size 6"),
        ({"inputs": ["ids int64 batch batch"], "pad": {"ids": (0, 0)}}, r"is exported as batch, which can't be padded"),
    ],
)
def test_what_does_not_fit_the_model(changed, message):
    with pytest.raises(ConfigError, match=message):
        padded(**changed)
