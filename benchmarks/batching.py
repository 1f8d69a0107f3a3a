"""`make bench-batching`: single-instance requests beside an offline loop over ready-made batches of 32.

One agent with one thread, as the offline loop has, which leaves a core for clients and server. First with instances of
one length, then with lengths from 8 to 128 under `pad`, beside an offline loop over batches sorted by length.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.load import drive, predict_request
from benchmarks.models import Encoder, Pooled, encoder
from benchmarks.report import Row, machine, report
from benchmarks.servers import ROOT, up
from shardserve.shards.collective import SingleRank
from shardserve.shards.program import Program

BLOCKS, LENGTH, BATCH = 2, 64, 32
# So that an instance takes somewhat less than 1 ms.
WIDTHS = {"equal": 136, "mixed": 96}
SHORTEST, LONGEST = 8, 128
INSTANCES = 2048
ROUNDS = 5
SECONDS = 4.0
IN_FLIGHT = {"equal": 96, "mixed": 192}
GOALS = {"equal": 0.8, "mixed": 0.7}


def lengths(kind: str) -> list[int]:
    if kind == "equal":
        return [LENGTH] * INSTANCES
    return np.random.default_rng(3).integers(SHORTEST, LONGEST + 1, INSTANCES).tolist()


def offline(model_dir: Path, kind: str) -> float:
    """Instances a second of a loop over batches that are ready, padded to the longest of each."""
    torch.set_num_threads(1)
    program = Program.load(model_dir / "device0" / "encoder.graph.json")
    ordered = sorted(lengths(kind))
    batches = []
    for i in range(0, INSTANCES, BATCH):
        sizes = torch.tensor(ordered[i : i + BATCH])
        mask = torch.arange(int(sizes.max()))[None] < sizes[:, None]
        batches.append([torch.randint(0, 1000, mask.shape), mask])
    with torch.inference_mode():
        for timed in (batches[:8], batches):
            start = time.perf_counter()
            for batch in timed:
                program.begin()
                program.run({"batch": BATCH, "length": batch[1].shape[1]}, batch, SingleRank())
    return INSTANCES / (time.perf_counter() - start)


def measure(folder: Path) -> list[Row]:
    return [row for kind, goal in GOALS.items() for row in measure_kind(folder / kind, kind, goal)]


def measure_kind(folder: Path, kind: str, goal: float) -> list[Row]:
    folder.mkdir()
    model = Pooled(Encoder(BLOCKS, WIDTHS[kind]))
    encoder(folder, model, 1, 1, None, BATCH, max_batch_size=BATCH, pad={"ids": (0, 0), "mask": (0, False)})
    random = np.random.default_rng(5)
    requests = [
        predict_request("encoder", [{"ids": random.integers(0, 1000, n), "mask": np.ones(n, bool)}])
        for n in lengths(kind)
    ]
    floors, ours = [], []
    with up(folder, "encoder", SHARDSERVE_AGENT_THREADS="1") as server:
        drive(server.grpc, requests, IN_FLIGHT[kind], SECONDS / 3)
        for _ in range(ROUNDS):
            command = [sys.executable, "-m", "benchmarks.batching", str(folder / "model"), kind]
            floors.append(json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout))
            ours.append(drive(server.grpc, requests, IN_FLIGHT[kind], SECONDS))
    floor = statistics.median(floors)
    what = f"length {LENGTH}" if kind == "equal" else f"lengths {SHORTEST} to {LONGEST}"
    name = f"{IN_FLIGHT[kind]} requests in flight, {what}; floor: offline batches of {BATCH}"
    return [
        Row(f"model time of an instance offline, {what}", "ms", None, 1e3 / floor, at_most=1.0),
        Row(name, "1/s", floor, statistics.median(ours), at_least=goal),
    ]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(offline(Path(sys.argv[1]), sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as name:
            report("batching", measure(Path(name)), machine())
