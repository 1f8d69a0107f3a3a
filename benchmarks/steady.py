"""`make bench-steady`: 100,000 requests: what every process holds after the first 10,000 of them and at the end."""

from __future__ import annotations

import asyncio
import os
import tempfile
from itertools import repeat
from pathlib import Path

import psutil

from benchmarks.load import channel_to, drive_over, matmul_request
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import Up, up

REQUESTS = 100_000
WARM = 10_000
IN_FLIGHT = 16
GROWTH = 1.05

Held = tuple[dict[tuple[str, int], tuple[int, int, int]], int]


def snapshot(server: Up) -> dict[tuple[str, int], tuple[int, int, int]]:
    """role and pid → RSS in bytes, open descriptors, threads."""
    found = {}
    for role, processes in server.find_processes().items():
        for process in processes:
            with process.oneshot():
                found[role, process.pid] = (process.memory_info().rss, process.num_fds(), process.num_threads())
    return found


def segments() -> int:
    return len(os.listdir("/dev/shm")) + sum(
        "memfd:shardserve" in target for process in psutil.process_iter() for target in _targets(process)
    )


def _targets(process: psutil.Process) -> list[str]:
    folder = Path(f"/proc/{process.pid}/fd")
    try:
        return [os.readlink(entry) for entry in folder.iterdir()]
    except OSError:
        return []


async def drive(server: Up) -> tuple[Held, Held]:
    """What is held after so many requests. The connection is one and stays open: when a server has noticed that
    another one has ended is a matter of chance."""
    request = matmul_request()
    async with channel_to(server.grpc) as channel:
        await drive_over(channel, repeat(request, WARM), IN_FLIGHT)
        before = snapshot(server), segments()
        await drive_over(channel, repeat(request, REQUESTS - WARM), IN_FLIGHT)
        return before, (snapshot(server), segments())


def measure(folder: Path) -> list[Row]:
    matmul(folder, 2)
    with up(folder, "matmul") as server:
        (before, segments_before), (after, segments_after) = asyncio.run(drive(server))
    if before.keys() != after.keys():
        raise AssertionError(f"processes changed: {before.keys() ^ after.keys()}")
    rows = []
    for (role, pid), (rss, fds, threads) in before.items():
        now_rss, now_fds, now_threads = after[role, pid]
        rows.append(Row(f"{role}: RSS after {REQUESTS} requests", "MB", rss / 1e6, now_rss / 1e6, GROWTH))
        rows.append(Row(f"{role}: descriptors", "", fds, now_fds, 1.0))
        rows.append(Row(f"{role}: threads", "", threads, now_threads, 1.0))
    return [*rows, Row("segments of shared memory held", "", None, segments_after - segments_before, 0)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("steady", measure(Path(name)), machine())
