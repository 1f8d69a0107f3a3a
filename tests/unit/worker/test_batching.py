import ml_dtypes
import numpy as np
import pytest

from shardserve.errors import ConfigError, InvalidInput
from shardserve.servable import Model, Servable
from shardserve.shards.config import DimRange, Signature, TensorSpec
from shardserve.shards.expressions import Expression
from shardserve.wire.frames import FrameError, padded
from shardserve.worker.answer import Answer
from shardserve.worker.batching import UNBOUNDED_BATCH, Batching
from shardserve.worker.calls import Call
from shardserve.worker.model_calls import model_batchings


def spec(text):
    """ "x float32 batch 3" """
    name, dtype, *shape = text.split()
    return TensorSpec(name, dtype, tuple(int(size) if size.isdecimal() else size for size in shape))


def signature(inputs, outputs, conditions=(), **dims):
    return Signature(
        {name: DimRange(*ends) for name, ends in dims.items()},
        tuple(map(spec, inputs)),
        tuple(map(spec, outputs)),
        conditions,
    )


def batching(inputs, outputs, conditions=(), model=None, **dims):
    return Batching(Model(rank_size=1, stage_size=1, **(model or {})), signature(inputs, outputs, conditions, **dims))


@pytest.fixture
def call():
    def make(*arrays):
        return Call(arrays, (), None, Answer())

    return make


def payload(*arrays):
    """What the leader of the last stage sends."""
    out = np.zeros(sum(padded(a.nbytes) for a in arrays), np.uint8)
    at = 0
    for a in arrays:
        out[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        at += padded(a.nbytes)
    return out


def same(array, expected):
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("shapes", "with_batch_dim"), [(["x float32 batch 1", "z int64 batch"], True), (["x float32 1", "z int64"], False)]
)
def test_a_plain_number_goes_to_an_input_of_no_dims(shapes, with_batch_dim):
    batches = batching(
        shapes,
        ["y float32 batch" if with_batch_dim else "y float32"],
        batch=(1, 8),
        model={"with_batch_dim": with_batch_dim},
    )
    x, z = batches.inputs([np.ones(1, np.float32), np.array([3])])
    same(x, np.ones(1, np.float32))
    same(z, np.array(3))
    batches.key((x, z))
    with pytest.raises(InvalidInput, match=r"'z' must have shape \[\], got \[2\]"):
        batches.key(batches.inputs([x, np.array([3, 4])]))
    assert batches.inputs([x, "3"]) == (x, "3")


def test_stack_and_split(call):
    batches = batching(["x float32 batch 3"], ["y float32 batch 2", "z int64 batch"], batch=(1, 8))
    assert batches.max_size == 8
    rows = [np.arange(3, dtype=np.float32) + 10 * i for i in range(3)]
    calls = [call(row) for row in rows]
    batch = batches.make_batch(calls)
    assert batch.dims == {"batch": 3}
    same(batch.arrays[0], np.stack(rows))
    y, z = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([7, 8, 9])
    results = batches.split_batch(batch, payload(y, z))
    for i, (first, second) in enumerate(results):
        same(first, y[i])
        same(second, z[i])
        assert isinstance(second, np.ndarray)


def test_one_call(call):
    batches = batching(["x float32 batch 3"], ["y float32 batch 3"], batch=(1, 8))
    backwards = np.arange(6, dtype=np.float32)[::-2]
    batch = batches.make_batch([call(backwards)])
    assert batch.arrays[0].flags.c_contiguous
    same(batch.arrays[0], backwards[None])


def test_without_batch_dim(call):
    batches = batching(
        ["x float32 rows 3"], ["y float32 rows", "n int64"], model={"with_batch_dim": False}, rows=(1, 9)
    )
    assert batches.max_size == 1
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert batches.key([x]) == ((4, 3),)
    batch = batches.make_batch([call(x)])
    assert batch.dims == {"rows": 4}
    same(batch.arrays[0], x)
    assert batch.arrays[0].flags.c_contiguous
    y, n = np.arange(4, dtype=np.float32), np.array(5)
    [(first, second)] = batches.split_batch(batch, payload(y, n))
    same(first, y)
    same(second, n)
    assert second.shape == ()


def test_scalars_and_empty_tensors(call):
    batches = batching(["x float32 batch", "e int32 batch 0 2"], ["y float32 batch", "e float64 batch 0"], batch=(1, 4))
    calls = [call(np.array(i, np.float32), np.empty((0, 2), np.int32)) for i in range(2)]
    assert batches.key(calls[0].arrays) == ((), (0, 2))
    batch = batches.make_batch(calls)
    assert [array.shape for array in batch.arrays] == [(2,), (2, 0, 2)]
    results = batches.split_batch(batch, payload(np.array([3, 4], np.float32), np.empty(0)))
    assert [y.item() for y, _ in results] == [3, 4]
    assert all(y.shape == () and e.shape == (0,) and e.dtype == np.float64 for y, e in results)


def test_scalar_inputs_without_batch_dim(call):
    batches = batching(["x float32"], ["y float32"], model={"with_batch_dim": False})
    batch = batches.make_batch([call(np.array(2, np.float32))])
    assert batch.arrays[0].shape == ()
    [(y,)] = batches.split_batch(batch, payload(np.array(4, np.float32)))
    same(y, np.array(4, np.float32))


def test_bfloat16_and_bool(call):
    batches = batching(["x bfloat16 batch 2", "m bool batch"], ["y bfloat16 batch 2", "m bool batch"], batch=(1, 4))
    x = np.array([1.5, -2], ml_dtypes.bfloat16)
    calls = [call(x, np.array(True)), call(x * 2, np.array(False))]
    batches.key(calls[0].arrays)
    batch = batches.make_batch(calls)
    same(batch.arrays[0], np.stack([x, x * 2]))
    results = batches.split_batch(batch, payload(*batch.arrays))
    same(results[1][0], x * 2)
    assert [m.item() for _, m in results] == [True, False]


@pytest.mark.parametrize(("size", "dims"), [("batch", {"batch": (2, 8)}), ("4", {})], ids=["least", "static"])
def test_what_mixes_instances_is_refused_where_one_alone_is_filled_up_with_copies(size, dims):
    with pytest.raises(ConfigError, match=r"output y\[3\] can't be split into instances"):
        batching([f"x float32 {size} 3"], ["y float32 3"], model={"max_batch_size": 1}, **dims)


def test_what_mixes_instances_is_never_filled_up_to_meet_a_condition():
    batches = batching(
        ["x float32 batch n"],
        ["y float32 n"],
        ["(batch * n) % 2 == 0"],
        {"max_batch_size": 1},
        batch=(1, 8),
        n=(1, 8),
    )
    assert batches.key([np.ones(2, np.float32)])
    with pytest.raises(InvalidInput, match=r"\(batch \* n\) % 2 == 0"):
        batches.key([np.ones(3, np.float32)])


def test_what_mixes_instances_may_be_served_one_at_a_time(call):
    batches = batching(["x float32 batch 3"], ["y float32 3"], model={"max_batch_size": 1}, batch=(1, 8))
    batch = batches.make_batch([call(np.ones(3, np.float32))])
    assert batch.dims == {"batch": 1}
    [(y,)] = batches.split_batch(batch, payload(np.ones(3, np.float32)))
    same(y, np.ones(3, np.float32))


def test_static_batch_is_padded_with_the_last_instance(call):
    batches = batching(["x float32 4 2"], ["y float32 4"])
    assert batches.max_size == 4
    calls = [call(np.full(2, i, np.float32)) for i in range(2)]
    batches.key(calls[0].arrays)
    batch = batches.make_batch(calls)
    same(batch.arrays[0], np.array([[0, 0], [1, 1], [1, 1], [1, 1]], np.float32))
    results = batches.split_batch(batch, payload(np.arange(4, dtype=np.float32)))
    assert [y.item() for (y,) in results] == [0, 1]


def test_batch_below_the_least_size_is_padded(call):
    batches = batching(["x float32 batch"], ["y float32 batch"], batch=(2, 8))
    x = np.array(3, np.float32)
    batches.key([x])
    batch = batches.make_batch([call(x)])
    assert batch.dims == {"batch": 2}
    [(y,)] = batches.split_batch(batch, payload(np.array([5, 6], np.float32)))
    assert y.item() == 5


def test_batch_that_a_condition_refuses_is_padded(call):
    batches = batching(["x float32 batch"], ["y float32 batch"], ["batch % 4 == 1"], batch=(1, 9))
    calls = [call(np.array(i, np.float32)) for i in range(3)]
    batches.key(calls[0].arrays)
    assert batches.make_batch(calls[:1]).dims == {"batch": 1}
    batch = batches.make_batch(calls)
    assert batch.dims == {"batch": 5}
    same(batch.arrays[0], np.array([0, 1, 2, 2, 2], np.float32))
    assert len(batches.split_batch(batch, payload(np.zeros(5, np.float32)))) == 3


def test_the_largest_batch_is_one_that_the_conditions_accept(call):
    batches = batching(["x float32 batch"], ["y float32 batch"], conditions=("batch % 2 == 0",), batch=(2, 7))
    calls = [call(np.float32(i).reshape(())) for i in range(9)]
    chosen = batches.choose(calls)
    assert chosen == calls[:6]
    assert batches.make_batch(chosen).dims == {"batch": 6}


def test_no_batch_that_the_conditions_accept():
    batches = batching(["x float32 batch n"], ["y float32 batch"], ["n % 2 == 0"], batch=(1, 4), n=(1, 9))
    batches.key([np.zeros(4, np.float32)])
    with pytest.raises(InvalidInput, match=r"the inputs' sizes must satisfy n % 2 == 0, got batch = 1, n = 3"):
        batches.key([np.zeros(3, np.float32)])


@pytest.fixture
def evaluated(monkeypatch):
    """The conditions that have been evaluated so far."""
    texts, evaluate = [], Expression.evaluate

    def counted(expression, dims):
        texts.append(expression.text)
        return evaluate(expression, dims)

    monkeypatch.setattr(Expression, "evaluate", counted)
    return texts


def refused(batches, length):
    with pytest.raises(InvalidInput) as caught:
        batches.key([np.zeros(length, np.float32)])
    return str(caught.value)


def test_only_conditions_that_name_the_batch_dim_are_tried_with_other_sizes(evaluated):
    conditions = ["n % 2 == 0", "(batch * n) % 12 == 0"]
    dims = {"batch": (1, 60_000), "n": (1, 60_000)}
    batches = batching(["x float32 batch n"], ["y float32 batch"], conditions, **dims)
    assert "must satisfy n % 2 == 0, got batch = 1, n = 3" in refused(batches, 3)
    assert len(evaluated) <= 2
    evaluated.clear()
    batches.key([np.zeros(8, np.float32)])
    # Of 1, 2 and 3 instances.
    assert len(evaluated) <= 6


def test_what_is_refused_is_remembered(evaluated):
    batches = batching(["x float32 batch n"], ["y float32 batch"], ["batch * n <= 8"], batch=(2, 100), n=(1, 20))
    first = refused(batches, 5)
    assert first == "the inputs' sizes must satisfy batch * n <= 8, got batch = 2, n = 5"
    evaluated.clear()
    assert refused(batches, 5) == first
    assert evaluated == []


def test_the_largest_batch_is_found_in_one_pass(call, evaluated):
    batches = batching(["x float32 batch n"], ["y float32 batch"], ["batch * n <= 8"], batch=(1, 1000), n=(1, 20))
    calls = [call(np.zeros(2, np.float32)) for _ in range(9)]
    assert batches.choose(calls) == calls[:4]
    assert len(evaluated) <= 1000


def test_a_padded_batch_may_be_larger_than_the_model_s_own_limit(call):
    conditions, limit = ("batch % 4 == 0",), {"max_batch_size": 3}
    batches = batching(["x float32 batch"], ["y float32 batch"], conditions, limit, batch=(2, 7))
    calls = [call(np.float32(i).reshape(())) for i in range(9)]
    assert batches.choose(calls) == calls[:3]
    assert batches.make_batch(calls[:3]).dims == {"batch": 4}


def test_inputs_without_batch_dim(call):
    batches = batching(
        ["x float32 batch 2", "scale float32 2"],
        ["y float32 batch 2"],
        model={"without_batch_dim_inputs": (1,)},
        batch=(1, 8),
    )
    x, scale = np.ones(2, np.float32), np.array([3, 4], np.float32)
    # Only calls that agree in what they share may share a batch.
    assert batches.key([x, scale]) == batches.key([x * 5, scale.copy()])
    assert batches.key([x, scale]) != batches.key([x, scale * 2])
    batch = batches.make_batch([call(x, scale), call(x * 2, scale)])
    same(batch.arrays[0], np.stack([x, x * 2]))
    same(batch.arrays[1], scale)


def test_calls_of_other_shapes_have_other_keys():
    batches = batching(["x float32 batch n"], ["y float32 batch n"], batch=(1, 8), n=(1, 8))
    assert batches.key([np.zeros(3, np.float32)]) != batches.key([np.zeros(4, np.float32)])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(3), "input 'x' must have dtype float32, got float64"),
        (np.zeros((1, 3), np.float32), "input 'x' must have shape .3., got .1, 3."),
        (np.zeros(4, np.float32), "input 'x' must have size 3 at axis 0, got 4"),
        (np.array(["a", "b", "c"], object), "input 'x' must have dtype float32, got str or bytes"),
        ("text", "input 'x' must have dtype float32, got str"),
        (b"data", "input 'x' must have dtype float32, got bytes"),
    ],
)
def test_input_that_the_model_does_not_take(array, said):
    with pytest.raises(InvalidInput, match=said):
        batching(["x float32 batch 3"], ["y float32 batch"], batch=(1, 4)).key([array])


def test_greatest_batch():
    def size(dims, **model):
        return batching(["x float32 batch"], ["y float32 batch"], model=model, batch=dims).max_size

    assert size((1, 8)) == 8
    assert size((1, 8), max_batch_size=3) == 3
    assert size((1, 8), max_batch_size=30) == 8
    assert size((1, None)) == UNBOUNDED_BATCH
    assert size((1, None), max_batch_size=1000) == UNBOUNDED_BATCH


def test_a_greatest_batch_that_was_not_exported_is_an_error():
    def batchings(size, *dims):
        servable = Servable("s")
        servable.add_model(Model(rank_size=1, stage_size=1, max_batch_size=size))
        signatures = [signature(["x float32 batch"], ["y float32 batch"], batch=ends) for ends in dims]
        return [batching.max_size for batching in model_batchings(servable, signatures)]

    assert batchings(8, (1, 8)) == [8]
    # The subgraphs of one model.
    assert batchings(8, (1, 8), (1, 4)) == [8, 4]
    with pytest.raises(ConfigError, match=r"^max_batch_size=9 is more than the 8 that the model was exported for"):
        batchings(9, (1, 8), (1, 4))


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        (["x float32 batch", "y float32 n"], {}, r"share no first dim: x\['batch'\], y\['n'\]"),
        (["x float32 batch", "y float32"], {}, r"share no first dim: x\['batch'\], y\[\]"),
        (["x float32 batch", "y float32 4"], {}, "share no first dim"),
        (["x float32 2*batch", "y float32 2*batch batch"], {}, "the batch dim is the expression 2[*]batch, not a dim"),
        (
            ["x float32 batch", "y float32 batch"],
            {"without_batch_dim_inputs": (2,)},
            r"without_batch_dim_inputs=\(2,\), but the model takes 2 inputs",
        ),
    ],
)
def test_declaration_that_does_not_fit_the_model(inputs, options, said):
    with pytest.raises(ConfigError, match=said):
        batching(inputs, ["o float32 3"], model=options, batch=(1, 4), n=(1, 4))


@pytest.mark.parametrize(
    "output",
    [
        "y float32 n batch",
        "y float32 batch batch",
        "y float32 2*batch",
        "y float32 batch*n",
        "y float32",
        "y float32 n",
    ],
)
def test_output_that_can_not_be_cut_into_instances(output):
    # Each instance would get what was computed for the others, in a shape that depends on how many there were.
    shape = ", ".join(output.split()[2:])
    with pytest.raises(ConfigError, match=r"output y.*can't be split") as caught:
        batching(["x float32 batch n"], ["o float32 batch", output], batch=(1, 4), n=(1, 4))
    assert f"[{shape}]" in str(caught.value)


@pytest.mark.parametrize("size", [0, 64, 192])
def test_payload_of_another_size(call, size):
    batches = batching(["x float32 batch"], ["y float32 batch", "z float32 batch"], batch=(1, 4))
    batch = batches.make_batch([call(np.array(1, np.float32))])
    with pytest.raises(FrameError, match=rf"a payload of {size} bytes came where the header says 128"):
        batches.split_batch(batch, np.zeros(size, np.uint8))
