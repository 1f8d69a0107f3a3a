"""NCCL behind our interface: the same results as through shared memory, and waits that end with their generation."""

import threading

import pytest
import torch

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.lifetime import GenerationEnded
from shardserve.shards.config import DTYPES as DTYPE_NAMES
from tests.unit.agent.collectives.test_shared_memory import every_operation

from .ranks import run_nccl

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def every_dtype(member):
    every_operation(
        member, [(), (6, 5), (0, 3), (12,), (40_000, 3)], [getattr(torch, name) for name in sorted(DTYPE_NAMES)]
    )


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=two_devices)])
def test_every_operation_and_dtype(size, tmp_path):
    run_nccl(every_dtype, size, tmp_path)


def generations(member):
    for _ in range(3):
        collective = member.join()
        assert collective.all_reduce(torch.ones(3), "sum").tolist() == [member.size] * 3
        collective.collective.finish()
        member.lifetime.end()
        with pytest.raises(GenerationEnded):
            collective.all_reduce(torch.ones(3), "sum")
        with pytest.raises(GenerationEnded):
            collective.collective.finish()


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=two_devices)])
def test_one_generation_after_the_other_in_a_process(size, tmp_path):
    run_nccl(generations, size, tmp_path)


def waits(member):
    collective = member.join()
    collective.all_reduce(torch.ones(3), "sum")
    collective.collective.finish()
    if member.rank == 0:
        # Rank 1 never comes: the device waits, this thread doesn't, until the stream is waited for.
        x = torch.ones(3, device=member.device)
        collective.collective.all_reduce(x, "sum")
        threading.Timer(1.0, member.lifetime.end).start()
        member.synchronize()
        with pytest.raises(GenerationEnded):
            collective.collective.finish()
    else:
        member.lifetime.end()
    assert member.join().all_reduce(torch.ones(3), "sum").tolist() == [2.0] * 3


@two_devices
def test_the_end_of_a_generation_ends_a_wait_of_the_device(tmp_path):
    run_nccl(waits, 2, tmp_path)


def duplicate(member):
    member.device = torch.device("cuda", 0)
    with pytest.raises(CollectiveBroken, match="NCCL could not connect its ranks"):
        member.join()


@two_devices
def test_two_ranks_on_one_device_are_a_failed_forming(tmp_path):
    run_nccl(duplicate, 2, tmp_path)
