"""`make bench-collectives`: an all-reduce of 16 KB through our shared memory beside gloo's, on 2, 4 and 8 ranks."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks import ranks
from benchmarks.report import Row, machine, report
from shardserve.shards.collective import Collective

FLOATS = 4096
ROUNDS = 5
CALLS = {"shared_memory": 2000, "gloo": 100}
GOALS = {2: 1 / 5, 4: 1 / 10, 8: 1 / 20}


def p50(kind: str, size: int) -> float:
    """Median seconds of one all-reduce, the median of the ranks' medians."""

    def work(rank: int, collective: Collective) -> float:
        x = torch.full((FLOATS,), float(rank))
        took = []
        for _ in range(CALLS[kind]):
            start = time.perf_counter()
            total = collective.all_reduce(x, "sum")
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
    return rows


if __name__ == "__main__":
    report("collectives", measure(), machine())
