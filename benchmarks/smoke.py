"""`make bench-smoke`: time to ready, p50 of a matmul call beside a bare gRPC echo, time from kill -9 to a right answer.

The two servers are called in turns, round after round, by the same loop; figures are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.report import Row, machine, report
from shardserve.client import Client, status

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "matmul_distributed"
GRPC, REST, DISTRIBUTED, AGENT_PORT = "127.0.0.1:15500", "127.0.0.1:15501", "127.0.0.1:15502", 15510
ROUNDS = 9
CALLS = 100
STARTS = 3
KILLS = 5
SEED = 7


@contextlib.contextmanager
def echo(kind: str) -> Iterator[str]:
    """The address of a bare echo server."""
    command = [sys.executable, "-m", "benchmarks.echo", kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def up(model_dir: Path) -> Iterator[float]:
    """A running server; the seconds from its start to its `ready` line."""
    command = [sys.executable, "-m", "shardserve.cli", "up", str(EXAMPLE), "--model-dir", str(model_dir)]
    command += ["--grpc-address", GRPC, "--rest-address", REST, "--distributed-address", DISTRIBUTED]
    command += ["--agent-start-port", str(AGENT_PORT)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError("shardserve up did not get ready")
        yield time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def p50(call: Callable[[], object]) -> float:
    """Median seconds of `CALLS` calls."""
    took = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def measure(model_dir: Path) -> list[Row]:
    sys.path.insert(0, str(EXAMPLE / "export_model"))
    import torch
    from net import Net

    random = np.random.default_rng(SEED)
    x = random.standard_normal((128, 96), dtype=np.float32)
    with torch.inference_mode():
        expected = Net(SEED)(torch.from_numpy(x)).numpy()

    def right(client: Client) -> None:
        y = client.infer({"x": x}, timeout=60)[0]["y"]
        if np.abs(y - expected).max() > 1e-5:
            raise AssertionError("a wrong answer")

    starts = []
    for _ in range(STARTS):
        with up(model_dir) as seconds:
            starts.append(seconds)
    rounds: dict[str, list[float]] = {"sync": [], "aio": [], "ours": []}
    recoveries = []
    with contextlib.ExitStack() as stack:
        clients = {
            kind: stack.enter_context(Client(stack.enter_context(echo(kind)), "matmul", "predict", raise_errors=True))
            for kind in ("sync", "aio")
        }
        stack.enter_context(up(model_dir))
        ours = stack.enter_context(Client(GRPC, "matmul", "predict", raise_errors=True))
        for _ in range(ROUNDS):
            for kind, client in clients.items():
                rounds[kind].append(p50(lambda client=client: client.infer({"x": x})))
            rounds["ours"].append(p50(lambda: right(ours)))
        for turn in range(KILLS):
            rank = status(GRPC)["servables"][0]["replicas"][0]["ranks"][turn]
            os.kill(rank["pid"], signal.SIGKILL)
            start = time.perf_counter()
            right(ours)
            recoveries.append(time.perf_counter() - start)
    medians = {kind: statistics.median(values) for kind, values in rounds.items()}
    return [
        Row("up to ready, 8 ranks", "s", None, statistics.median(starts)),
        Row("p50 of a matmul call, 8 ranks; floor: bare gRPC echo", "ms", *scaled(medians, 1e3)),
        Row("kill -9 of a rank to the next right answer", "ms", None, statistics.median(recoveries) * 1e3),
        Row("the same, the slowest", "ms", None, max(recoveries) * 1e3),
    ]


def scaled(medians: dict[str, float], factor: float) -> tuple[float, float]:
    """The faster echo, and ours."""
    return min(medians["sync"], medians["aio"]) * factor, medians["ours"] * factor


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = EXAMPLE / "export_model" / "export_model.py"
        command = [sys.executable, str(script), "--random", str(SEED), "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report("smoke", measure(Path(folder)), machine())


if __name__ == "__main__":
    main()
