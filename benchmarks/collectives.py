"""`make bench-collectives`: an all-reduce of 16 KB through our shared memory beside gloo's, on 2, 4 and 8 ranks; where
there are so many CUDA devices NCCL's, too, with the wait for the device."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from benchmarks import ranks
from benchmarks.report import Row, machine, report
from shardserve.agent.collectives.group import GroupCollective

FLOATS = 4096
ROUNDS = 5
CALLS = {"shared_memory": 2000, "gloo": 100, "nccl": 2000}
GOALS = {2: 1 / 5, 4: 1 / 10, 8: 1 / 20}


def p50(kind: str, size: int) -> float:
    """Median seconds of one all-reduce, the median of the ranks' medians."""

    def work(rank: int, collective: GroupCollective) -> float:
        x = torch.full((FLOATS,), float(rank), device=torch.device("cuda", rank) if kind == "nccl" else "cpu")
        took = []
        for _ in range(CALLS[kind]):
            start = time.perf_counter()
            total = collective.all_reduce(x, "sum")
            if x.is_cuda:
                torch.cuda.current_stream().synchronize()
            collective.finish()
            took.append(time.perf_counter() - start)
        if not bool((total == size * (size - 1) / 2).all()):
            raise AssertionError("a wrong sum")
        return statistics.median(took[len(took) // 10 :])

    return statistics.median(ranks.run(kind, size, work))


def measure() -> list[Row]:
    rows = []
    for size, goal in GOALS.items():
        rounds: dict[str, list[float]] = {"gloo": [], "shared_memory": []}
        for _ in range(ROUNDS):
            for kind, values in rounds.items():
                values.append(p50(kind, size))
        gloo, ours = (statistics.median(values) * 1e6 for values in rounds.values())
        rows.append(Row(f"p50 of an all-reduce of 16 KB on {size} ranks; floor: gloo", "us", gloo, ours, goal))
    return rows + on_cuda()


def on_cuda() -> list[Row]:
    # Asked by another process: what has looked for devices forks none that can use them.
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    devices = int(subprocess.run(asked, stdout=subprocess.PIPE, check=True, timeout=120).stdout)
    if devices < 2:
        print(f"no rows of NCCL: it takes 2 CUDA devices, and torch {torch.__version__} finds {devices} here")
    rows = []
    for size in (size for size in GOALS if size <= devices):
        ours = statistics.median(p50("nccl", size) for _ in range(ROUNDS)) * 1e6
        rows.append(Row(f"p50 of an all-reduce of 16 KB on {size} CUDA devices, NCCL", "us", None, ours))
    return rows


if __name__ == "__main__":
    report("collectives", measure(), machine())
