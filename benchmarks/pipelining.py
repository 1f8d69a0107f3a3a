"""`make bench-pipelining`: throughput of a two-stage pipeline beside what its slowest stage could do alone.

Each stage runs alone in a process of one thread; the same files are then served, two agents of one thread on two cores.
Printed beside it: what two such processes get at once without a server, since cores share caches and memory.
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


def stages(model_dir: Path, processes: int) -> list[list[float]]:
    """`stage_alone` of so many processes at once."""
    command = [sys.executable, "-m", "benchmarks.pipelining", str(model_dir)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(processes)]
    return [json.loads(process.communicate()[0]) for process in started]


def slowest(measured: list[list[float]]) -> float:
    """Seconds of the slowest stage, each by its median."""
    return max(statistics.median(values) for values in zip(*measured, strict=True))


def measure(folder: Path) -> list[Row]:
    encoder(folder, Encoder(BLOCKS, WIDTH), 1, 2, LENGTH, 4, max_batch_size=1)
    ids = torch.randint(0, 1000, (LENGTH,)).numpy()
    request = predict_request("encoder", [{"ids": ids, "mask": ids >= 0}])
    alone: list[list[float]] = []
    together: list[list[float]] = []
    rates = []
    with up(folder, "encoder") as server:
        throughput(lambda: predict(server.grpc, request), CLIENTS, SECONDS / 3)
        for _ in range(ROUNDS):
            alone += stages(folder / "model", 1)
            together += stages(folder / "model", 2)
            rates.append(throughput(lambda: predict(server.grpc, request), CLIENTS, SECONDS))
    rate = statistics.median(rates)
    per_stage = [statistics.median(values) for values in zip(*alone, strict=True)]
    rows = [Row(f"stage {i} alone, one thread", "ms", None, seconds * 1e3) for i, seconds in enumerate(per_stage)]
    what = f"throughput of {CLIENTS} clients; floor: 1 / slowest stage"
    return [
        *rows,
        Row(what, "steps/s", 1 / slowest(alone), rate, at_least=GOAL),
        Row("the same; beside the stage where two processes run at once", "steps/s", 1 / slowest(together), rate),
    ]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(stage_alone(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as name:
            report("pipelining", measure(Path(name)), machine())
