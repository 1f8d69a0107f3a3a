"""`python -m benchmarks.recording`: what it costs to note the times of a step, in the Worker and in an agent.

With it the readings of the clock alone, which each of them needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.report import Row, machine, report
from shardserve.agent.timeline import Timeline
from shardserve.settings import Settings
from shardserve.wire.messages import Generation
from shardserve.worker.answer import Answer
from shardserve.worker.calls import Batch, Call
from shardserve.worker.timeline import StepTimeline

STEPS = 20_000
ROUNDS = 25
GOAL = 2.0
GENERATION = Generation(1, 1)


def best(run: Callable[[], None]) -> float:
    """Microseconds of a step, in the fastest of the rounds: others of the machine only make it slower."""
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took) / STEPS * 1e6


def readings(count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            for _ in range(count):
                time.monotonic()

    return run


def agent() -> None:
    timeline = Timeline(Settings().timeline_steps)
    for step in range(STEPS):
        received = time.monotonic()
        started = time.monotonic()
        timeline.record((GENERATION, step, received, received, started, time.monotonic()))


def worker(instances: int) -> Callable[[], None]:
    timeline = StepTimeline(Settings().timeline_steps)
    batch = Batch(tuple(Call((), (), None, Answer()) for _ in range(instances)), (), {"batch": instances})

    def run() -> None:
        for step in range(STEPS):
            sent = time.monotonic()
            timeline.record(GENERATION, step, batch, sent, time.monotonic(), failed=False, ended=False)

    return run


def main() -> None:
    two, three = best(readings(2)), best(readings(3))
    rows = [Row("agent", "us a step, at most 2", None, best(agent), at_most=GOAL)]
    rows += [
        Row(f"Worker, {count} instances in the batch", "us a step", None, best(worker(count)), at_most=GOAL)
        for count in (1, 8, 32)
    ]
    rows += [Row("reading the clock 3 times (agent)", "us", None, three), Row("… 2 times (Worker)", "us", None, two)]
    report("recording", rows, machine())


if __name__ == "__main__":
    main()
