"""Ranks of a group, each a process of its own with a device of its own."""

import multiprocessing
import os
import signal
import traceback
from pathlib import Path

import torch

from shardserve.agent.collectives.nccl import form_nccl
from shardserve.agent.forking import ENVIRONMENT
from shardserve.agent.lifetime import Lifetime
from shardserve.settings import Settings
from shardserve.wire.messages import Generation

# This process has looked for devices: what it forks can't use them.
spawn = multiprocessing.get_context("spawn")


class OnDevice:
    """A collective whose tensors come from the CPU, and go back there."""

    def __init__(self, collective, device):
        self.collective = collective
        self._device = device

    def __getattr__(self, name):
        def call(x, *arguments):
            return getattr(self.collective, name)(x.to(self._device), *arguments).cpu()

        return call


class Member:
    """What a rank's function gets."""

    def __init__(self, rank, size, folder):
        self.rank, self.size = rank, size
        self.device = torch.device("cuda", rank)
        self._folder = Path(folder)
        self._generations = 0

    def join(self):
        """The collective of a new generation."""
        self._generations += 1
        self.lifetime = Lifetime(Generation(1, self._generations))
        store = torch.distributed.FileStore(str(self._folder / f"store{self._generations}"), self.size)
        formed = form_nccl(store, self.rank, self.size, "127.0.0.1", self.device, self.lifetime, Settings())
        return OnDevice(formed, self.device)

    def synchronize(self):
        torch.cuda.current_stream(self.device).synchronize()


def live(function, rank, size, folder, pipe):
    signal.alarm(150)
    # As a fork server gives it to its agents.
    os.environ.update(ENVIRONMENT)
    try:
        torch.cuda.set_device(rank)
        with torch.inference_mode():
            function(Member(rank, size, folder))
        pipe.send("")
    except BaseException:  # noqa: BLE001 - the parent wants to know all
        pipe.send(traceback.format_exc())
    os._exit(0)


def run_nccl(function, size, folder):
    """`function(member)` on each rank; what one raises fails the test."""
    processes = []
    for rank in range(size):
        read, write = spawn.Pipe(duplex=False)
        process = spawn.Process(target=live, args=(function, rank, size, str(folder), write))
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
