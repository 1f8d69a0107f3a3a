import numpy as np
import pytest
import torch

from shardserve.agent.tensors import Layout, buffers_of, pinned, receiving_memory, to_host
from shardserve.shards.config import DTYPES, DimRange, Signature, TensorSpec
from shardserve.wire.frames import FrameError, padded

CPU = torch.device("cpu")
LAYOUT = Layout([TensorSpec("t", "int32", (2,))], Signature({}, (), ()), CPU)


def through_a_frame(tensors, specs, **dims):
    signature = Signature({name: DimRange(0) for name in dims}, (), ())
    payload = b""
    for buffer in buffers_of(tensors):
        payload += bytes(buffer).ljust(padded(len(buffer)), b"\0")
    return Layout(specs, signature, CPU).tensors(np.frombuffer(bytearray(payload), np.uint8), dims)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype))
    empty = torch.empty((0, 3), dtype=tensor.dtype)
    scalar = torch.ones((), dtype=tensor.dtype)
    specs = [
        TensorSpec("t", dtype, ("rows", 3)),
        TensorSpec("e", dtype, ("rows - 2", 3)),
        TensorSpec("s", dtype, ()),
    ]
    back = through_a_frame([tensor, empty, scalar], specs, rows=2)
    for before, after in zip([tensor, empty, scalar], back, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert torch.equal(after, before)


def test_values_that_have_no_numpy_dtype_or_are_not_finite():
    tensor = torch.tensor([1.5, -0.0, float("inf"), 3e38]).bfloat16()
    [back] = through_a_frame([tensor], [TensorSpec("t", "bfloat16", (4,))])
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


def test_strides_and_gradients_do_not_matter():
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).T[::2]
    [back] = through_a_frame([tensor], [TensorSpec("t", "float32", (2, 3))])
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 0],
        lambda x: x[:, 0:1],
        lambda x: x.diagonal(),
        lambda x: x[::2, 0],
        lambda x: x[:1].expand(3, 4),
        lambda x: x.T,
    ],
)
def test_views_of_every_kind(view, dtype):
    tensor = view(torch.arange(12).reshape(3, 4).to(dtype))
    [back] = through_a_frame([tensor], [TensorSpec("t", str(dtype).removeprefix("torch."), tuple(tensor.shape))])
    assert torch.equal(back, tensor)


def test_contiguous_tensors_are_not_copied():
    tensor = torch.zeros(4)
    [buffer] = buffers_of([tensor])
    tensor[0] = 1.0
    assert bytes(buffer[:4]) == np.float32(1).tobytes()


def test_tensors_are_views_of_the_payload():
    payload = np.zeros(64, np.uint8)
    [tensor] = LAYOUT.tensors(payload, {})
    payload[0] = 7
    assert tensor.tolist() == [7, 0]


def test_memory_for_what_is_received():
    assert receiving_memory(CPU) is None
    assert receiving_memory(torch.device("cuda", 0)) is pinned


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has CUDA devices")
def test_without_pinned_memory_there_is_other(caplog):
    assert pinned(10).shape == (10,)
    assert "no pinned memory for 10 bytes" in caplog.text


def test_what_is_brought_to_the_host_is_a_copy():
    """Of any dtype, shape and strides; here from the CPU itself."""
    tensors = [torch.arange(12.0).reshape(3, 4).T, torch.tensor(2.5).bfloat16(), torch.empty(0, 3), torch.ones(2) > 0]
    copies = to_host(tensors)
    for before, after in zip(tensors, copies, strict=True):
        assert (after.dtype, after.shape, after.is_contiguous()) == (before.dtype, before.shape, True)
        assert torch.equal(after, before)
        assert not after.numel() or after.data_ptr() != before.data_ptr()


@pytest.mark.parametrize("size", [0, 128])
def test_payload_of_another_size(size):
    with pytest.raises(FrameError, match=rf"a payload of {size} bytes came where the header says 64"):
        LAYOUT.tensors(np.zeros(size, np.uint8), {})
