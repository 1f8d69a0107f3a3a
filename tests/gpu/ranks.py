"""Ranks of a group, each a process of its own with a device of its own."""

import multiprocessing
import os
from pathlib import Path

import torch
from processes import run_processes

from shardserve.agent.collectives.nccl import form_nccl
from shardserve.agent.lifetime import Lifetime
from shardserve.agent.supervisor.processes import ENVIRONMENT
from shardserve.settings import Settings
from shardserve.wire.messages import Generation

from .moving import Moving

# This process has looked for devices: what it forks can't use them.
spawn = multiprocessing.get_context("spawn")


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
        return Moving(formed, self.device)

    def synchronize(self):
        torch.cuda.current_stream(self.device).synchronize()


def live(rank, size, function, folder):
    # As a fork server gives it to its agents.
    os.environ.update(ENVIRONMENT)
    torch.cuda.set_device(rank)
    with torch.inference_mode():
        function(Member(rank, size, folder))


def run_nccl(function, size, folder):
    """`function(member)` on each rank; what one raises fails the test."""
    run_processes(spawn, live, size, size, function, str(folder), seconds=150)
