"""gloo behind the same interface: the same results as through shared memory, for every dtype of a shard."""

import multiprocessing
import os
import signal
import traceback

import pytest
import torch

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.collectives.gloo import GlooCollective
from shardserve.agent.lifetime import Lifetime
from shardserve.settings import Settings
from shardserve.shards.config import DTYPES as DTYPE_NAMES
from shardserve.wire.messages import Generation

from .test_shared_memory import every_operation

pytestmark = pytest.mark.usefixtures("nothing_left")
fork = multiprocessing.get_context("fork")


class Member:
    def __init__(self, rank, size, store):
        self.rank, self.size, self._store = rank, size, store

    def join(self):
        lifetime = Lifetime(Generation(1, 1))
        return GlooCollective(self._store, self.rank, self.size, "127.0.0.1", lifetime, Settings())


def live(function, rank, size, folder, kind, pipe):
    signal.alarm(60)
    torch.set_num_threads(1)
    try:
        function(kind(rank, size, torch.distributed.FileStore(os.fspath(folder / "store"), size)))
        pipe.send("")
    except BaseException:  # noqa: BLE001 - the parent wants to know all
        pipe.send(traceback.format_exc())
    # Not through the exit handlers, which are pytest's.
    os._exit(0)


def run_gloo(function, size, folder, kind=Member):
    processes = []
    for rank in range(size):
        read, write = fork.Pipe(duplex=False)
        process = fork.Process(target=live, args=(function, rank, size, folder, kind, write))
        process.start()
        write.close()
        processes.append((process, read))
    errors = []
    for process, read in processes:
        errors.append(read.recv())
        process.join()
        process.close()
        read.close()
    assert errors == [""] * size, "".join(errors)


def every_dtype(member):
    every_operation(member, [(), (6, 5), (0, 3), (12,)], [getattr(torch, name) for name in sorted(DTYPE_NAMES)])


@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_and_dtype(size, tmp_path):
    run_gloo(every_dtype, size, tmp_path)


def impossible(member):
    collective = member.join()
    with pytest.raises(
        CollectiveBroken, match=r"reduce_scatter of \[7, 2\]: its first dim can't be divided by 2 ranks"
    ):
        collective.reduce_scatter(torch.ones(7, 2), "sum")
    with pytest.raises(CollectiveBroken, match=r"all_to_all of \[3\] in \[1, 1\] rows to 2 ranks"):
        collective.all_to_all(torch.ones(3), [1, 1], [1, 1])
    assert collective.all_reduce(torch.ones(2), "sum").tolist() == [2.0, 2.0]


def test_what_ranks_cannot_share_is_an_error_before_anything_is_exchanged(tmp_path):
    run_gloo(impossible, 2, tmp_path)
