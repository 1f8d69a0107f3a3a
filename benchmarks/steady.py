"""`make bench-steady`: 100,000 requests: what every process holds after the first 10,000 of them and at the end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil

from benchmarks.load import drive_count, matmul_request
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import Up, up

REQUESTS = 100_000
WARM = 10_000
IN_FLIGHT = 16
GROWTH = 1.05


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


def measure(folder: Path) -> list[Row]:
    matmul(folder, 2)
    request = matmul_request()
    with up(folder, "matmul") as server:
        drive_count(server.grpc, [request], IN_FLIGHT, WARM)
        before, segments_before = snapshot(server), segments()
        drive_count(server.grpc, [request], IN_FLIGHT, REQUESTS - WARM)
        after, segments_after = snapshot(server), segments()
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
