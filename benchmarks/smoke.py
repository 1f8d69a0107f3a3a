"""`make bench-smoke`: time to ready, p50 of a matmul call beside a bare gRPC echo, time from kill -9 to a right answer.

The servers are called in turns, round after round, by the same loop; figures are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.load import interleaved_p50
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import echo, up
from shardserve.client import Client, status

RANKS = 8
ROUNDS = 9
CALLS = 100
STARTS = 3
KILLS = 5
SEED = 7


def measure(folder: Path) -> list[Row]:
    net = matmul(folder, RANKS, SEED)
    x = np.random.default_rng(SEED).standard_normal((128, 96), dtype=np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x)).numpy()

    def right(client: Client) -> None:
        answer = client.infer({"x": x}, timeout=60)
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        y = answer[0]["y"]
        if np.abs(y - expected).max() > 1e-5:
            raise AssertionError("a wrong answer")

    starts = []
    for _ in range(STARTS):
        with up(folder, "matmul") as server:
            starts.append(server.ready_seconds)
    recoveries = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(up(folder, "matmul"))
        sync, aio, ours = (
            stack.enter_context(Client(address, "matmul", "predict", raise_errors=True))
            for address in (stack.enter_context(echo("sync")), stack.enter_context(echo("aio")), server.grpc)
        )
        calls = {
            "sync": lambda: sync.infer({"x": x}),
            "aio": lambda: aio.infer({"x": x}),
            "ours": lambda: right(ours),
        }
        p50 = interleaved_p50(calls, ROUNDS, CALLS)
        for turn in range(KILLS):
            rank = status(server.grpc)["servables"][0]["replicas"][0]["ranks"][turn]
            os.kill(rank["pid"], signal.SIGKILL)
            start = time.perf_counter()
            right(ours)
            recoveries.append(time.perf_counter() - start)
    floor = min(p50["sync"], p50["aio"])
    return [
        Row("up to ready, 8 ranks", "s", None, statistics.median(starts)),
        Row("p50 of a matmul call, 8 ranks; floor: bare gRPC echo", "ms", floor * 1e3, p50["ours"] * 1e3),
        Row("kill -9 of a rank to the next right answer", "ms", None, statistics.median(recoveries) * 1e3),
        Row("the same, the slowest", "ms", None, max(recoveries) * 1e3),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report("smoke", measure(Path(folder)), machine())


if __name__ == "__main__":
    main()
