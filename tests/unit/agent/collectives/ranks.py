"""Ranks of a group, each a forked process: on the same memory, or over gloo."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback

import torch
from processes import run_processes

from shardserve.agent.collectives.gloo import GlooCollective
from shardserve.agent.collectives.memory import create_memory
from shardserve.agent.collectives.shared_memory import SharedMemoryCollective
from shardserve.agent.lifetime import Lifetime
from shardserve.settings import Settings
from shardserve.wire.messages import Generation

SLOT = 4096
fork = multiprocessing.get_context("fork")


class Member:
    """What a rank's function gets."""

    def __init__(self, fd, rank, size, slot_bytes, timeout, barrier):
        self.rank, self.size, self.barrier = rank, size, barrier
        self._arguments = fd, rank, size, slot_bytes
        self._timeout = timeout
        self._generations = 0

    def join(self):
        """The collective of a new generation; returns when all ranks have theirs."""
        self._generations += 1
        self.lifetime = Lifetime(Generation(1, self._generations))
        collective = SharedMemoryCollective(*self._arguments, self.lifetime, self._timeout)
        self.barrier.wait(30)
        return collective


class Ranks:
    def __init__(self, function, size, slot_bytes=SLOT, timeout=30.0, arguments=()):
        fd = create_memory(size, slot_bytes)
        # Kept: its shared state would be given to the next barrier, while ranks still use it.
        barrier = self._barrier = fork.Barrier(size)
        self.pids, self._pipes = [], []
        for rank in range(size):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                member = Member(fd, rank, size, slot_bytes, timeout, barrier)
                _live(function, member, arguments, write)
            os.close(write)
            self.pids.append(pid)
            self._pipes.append(read)
        os.close(fd)

    def kill(self, rank):
        os.kill(self.pids[rank], signal.SIGKILL)

    def results(self, *dead):
        """What the ranks' functions returned, None for the dead ones; what one raised fails the test."""
        collected = []
        for rank, (pid, read) in enumerate(zip(self.pids, self._pipes, strict=True)):
            with open(read, "rb") as pipe:
                data = pipe.read()
            os.waitpid(pid, 0)
            if rank in dead:
                collected.append(None)
                continue
            ok, value = pickle.loads(data) if data else (False, f"rank {rank} said nothing")
            assert ok, value
            collected.append(value)
        return collected


def run_ranks(function, size, *arguments, slot_bytes=SLOT, timeout=30.0):
    return Ranks(function, size, slot_bytes, timeout, arguments).results()


def _live(function, member, arguments, write):
    signal.alarm(60)
    torch.set_num_threads(1)
    try:
        outcome = True, function(member, *arguments)
    except BaseException:  # noqa: BLE001 - the parent wants to know all
        outcome = False, traceback.format_exc()
    with contextlib.suppress(BrokenPipeError), open(write, "wb") as pipe:
        pipe.write(pickle.dumps(outcome))
    os._exit(0)


class GlooMember:
    """What a rank's function gets over gloo."""

    def __init__(self, rank, size, store):
        self.rank, self.size, self.store = rank, size, store

    def join(self):
        lifetime = Lifetime(Generation(1, 1))
        return GlooCollective(self.store, self.rank, self.size, "127.0.0.1", lifetime, Settings())


def _live_over_gloo(rank, size, function, folder, kind):
    torch.set_num_threads(1)
    function(kind(rank, size, torch.distributed.FileStore(os.fspath(folder / "store"), size)))


def run_gloo(function, size, folder, kind=GlooMember):
    """`function(member)` on each rank, a member of that kind; what one raises fails the test."""
    run_processes(fork, _live_over_gloo, size, size, function, folder, kind)
