"""Ranks without a server: forked processes that join a collective and run a function; the floor of sharded latency."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from benchmarks.servers import free_port
from shardserve.agent.collectives.gloo import GlooCollective
from shardserve.agent.collectives.group import GroupCollective
from shardserve.agent.collectives.memory import create_memory, slot_size
from shardserve.agent.collectives.nccl import form_nccl
from shardserve.agent.collectives.shared_memory import SharedMemoryCollective
from shardserve.agent.lifetime import Lifetime
from shardserve.agent.supervisor.processes import ENVIRONMENT
from shardserve.settings import Settings
from shardserve.wire.messages import Generation

Work = Callable[[int, GroupCollective], Any]


def run(kind: str, size: int, work: Work) -> list[Any]:
    """What work(rank, collective) gives on each of `size` ranks of one thread each; it has to be JSON.

    kind: shared_memory, gloo, or nccl, of which rank i has device i: this process must not have looked for devices.
    RuntimeError with the traceback if a rank raises.
    """
    settings = Settings()
    fd = create_memory(size, slot_size(settings)) if kind == "shared_memory" else -1
    port = free_port()
    pipes, pids = [], []
    gates = [os.pipe() for _ in range(size)]
    for rank in range(size):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code, text = 0, ""
            try:
                torch.set_num_threads(1)
                with torch.inference_mode():
                    collective = _collective(kind, fd, rank, size, port, settings, gates)
                    text = json.dumps(work(rank, collective))
                    barrier(collective)
            except BaseException:  # noqa: BLE001 - the parent raises it
                code, text = 1, traceback.format_exc()
            with os.fdopen(write, "w") as pipe:
                pipe.write(text)
            os._exit(code)
        os.close(write)
        pipes.append(read)
        pids.append(pid)
    for descriptor in (descriptor for gate in gates for descriptor in gate):
        os.close(descriptor)
    results = []
    failure = ""
    for pid, read in zip(pids, pipes, strict=True):
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status:
            failure = failure or text
        else:
            results.append(json.loads(text))
    if fd >= 0:
        os.close(fd)
    if failure:
        raise RuntimeError(failure)
    return results


def _collective(
    kind: str, fd: int, rank: int, size: int, port: int, settings: Settings, gates: list[tuple[int, int]]
) -> GroupCollective:
    lifetime = Lifetime(Generation(1, 1))
    if kind in ("gloo", "nccl"):
        # Made after the fork: its threads would not be there in a child.
        store = TCPStore("127.0.0.1", port, size, is_master=rank == 0)
        if kind == "gloo":
            return GlooCollective(store, rank, size, "127.0.0.1", lifetime, settings)
        # As an agent has it.
        os.environ.update(ENVIRONMENT)
        torch.cuda.set_device(rank)
        return form_nccl(store, rank, size, "127.0.0.1", torch.device("cuda", rank), lifetime, settings)
    collective = SharedMemoryCollective(fd, rank, size, slot_size(settings), lifetime, settings.step_timeout)
    # Every rank has its own before any uses it: each tells all others.
    for _, write in gates:
        os.write(write, b".")
    told = 0
    while told < size:
        told += len(os.read(gates[rank][0], size - told))
    return collective


def barrier(collective: GroupCollective) -> None:
    collective.all_reduce(torch.zeros(1), "sum")
