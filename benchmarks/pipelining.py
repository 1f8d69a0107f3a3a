"""`make bench-pipelining`: throughput of a two-stage pipeline beside what its slowest stage could do alone.

Each stage runs alone in a process of one thread; the same files are then served, two agents of one thread on two cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.load import predict, predict_request, throughput
from benchmarks.models import Encoder, encoder
from benchmarks.report import Row, machine, report
from benchmarks.servers import ROOT, up
from shardserve.shards.collective import SingleRank
from shardserve.shards.program import Program

BLOCKS, WIDTH, LENGTH = 12, 320, 64
ROUNDS = 5
CALLS = 30
CLIENTS = 6
SECONDS = 4.0
GOAL = 0.9


def stage_alone(model_dir: Path) -> list[float]:
    """Median seconds of each stage on its own, one thread."""
    torch.set_num_threads(1)
    programs = [Program.load(model_dir / f"device{stage}" / "encoder.graph.json") for stage in range(2)]
    ids = torch.randint(0, 1000, (1, LENGTH))
    values: list[torch.Tensor] = [ids, torch.ones_like(ids, dtype=torch.bool)]
    medians = []
    with torch.inference_mode():
        for program in programs:
            took = []
            for _ in range(CALLS):
                start = time.perf_counter()
                program.begin()
                outputs = program.run({"batch": 1}, values, SingleRank())
                took.append(time.perf_counter() - start)
            medians.append(statistics.median(took))
            values = list(outputs)
    return medians


def measure(folder: Path) -> list[Row]:
    encoder(folder, Encoder(BLOCKS, WIDTH), 1, 2, LENGTH, 4, max_batch_size=1)
    ids = torch.randint(0, 1000, (LENGTH,)).numpy()
    request = predict_request("encoder", [{"ids": ids, "mask": ids >= 0}])
    alone: list[list[float]] = []
    rates = []
    with up(folder, "encoder") as server:
        throughput(lambda: predict(server.grpc, request), CLIENTS, SECONDS / 3)
        for _ in range(ROUNDS):
            command = [sys.executable, "-m", "benchmarks.pipelining", str(folder / "model")]
            alone.append(json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout))
            rates.append(throughput(lambda: predict(server.grpc, request), CLIENTS, SECONDS))
    stages = [statistics.median(values) for values in zip(*alone, strict=True)]
    rows = [Row(f"stage {i} alone, one thread", "ms", None, seconds * 1e3) for i, seconds in enumerate(stages)]
    what = f"throughput of {CLIENTS} clients; floor: 1 / slowest stage"
    return [*rows, Row(what, "steps/s", 1 / max(stages), statistics.median(rates), at_least=GOAL)]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(stage_alone(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as name:
            report("pipelining", measure(Path(name)), machine())
