"""Pinned memory, from a socket to the device and back."""

import contextlib
import socket

import torch

from shardserve.agent.tensors import Layout, buffers_of, receiving_memory, to_host
from shardserve.shards.config import DTYPES, Signature, TensorSpec
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import Generation, group

DEVICE = torch.device("cuda", 0)


def test_payloads_and_outputs_are_pinned_and_of_every_dtype():
    tensors = [torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype)) for dtype in sorted(DTYPES)]
    specs = [TensorSpec(dtype, dtype, (2, 3)) for dtype in sorted(DTYPES)]
    ours, theirs = socket.socketpair()
    memory = receiving_memory(DEVICE)
    with (
        contextlib.closing(FrameSocket(ours, group.OnStageLink)) as sender,
        contextlib.closing(FrameSocket(theirs, group.OnStageLink, allocate=memory)) as receiver,
    ):
        sender.send(group.Transfer(Generation(1, 1), 0), buffers_of(tensors))
        _, payload = receiver.receive()
    assert torch.from_numpy(payload).is_pinned()
    on_device = Layout(specs, Signature({}, (), ()), DEVICE).tensors(payload, {})
    assert {tensor.device for tensor in on_device} == {DEVICE}
    copies = to_host([tensor.T for tensor in on_device])
    torch.cuda.current_stream(DEVICE).synchronize()
    for before, after in zip(tensors, copies, strict=True):
        assert after.is_pinned()
        assert after.is_contiguous()
        assert torch.equal(after, before.T)
