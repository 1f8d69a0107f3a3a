"""`make bench-sharded`: a served tensor-parallel model beside bare loops of the same shards without a server.

tp 2, 12 blocks, 24 all-reduces. The bare loops run the same files over our collective and over gloo; the bound is
1.05 x the bare loop over our collective plus what the server costs by `benchmarks.overhead`, measured in the same run.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import overhead, ranks
from benchmarks.load import interleaved_p50, predict, predict_request
from benchmarks.models import Encoder, encoder
from benchmarks.report import Row, machine, report
from benchmarks.servers import up
from shardserve.agent.collectives.group import GroupCollective
from shardserve.shards.program import Program

BLOCKS, WIDTH, LENGTH = 12, 256, 64
ROUNDS = 5
CALLS = 40
GOAL = 1.05


def bare(kind: str, model_dir: Path, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Median seconds of a step of the two shards."""

    def work(rank: int, collective: GroupCollective) -> float:
        program = Program.load(model_dir / f"device{rank}" / "encoder.graph.json")
        dims = {"batch": ids.shape[0]}
        took = []
        for _ in range(CALLS):
            ranks.barrier(collective)
            start = time.perf_counter()
            program.begin()
            program.run(dims, [ids, mask], collective)
            took.append(time.perf_counter() - start)
        return statistics.median(took[5:])

    return max(ranks.run(kind, 2, work))


def measure(folder: Path) -> list[Row]:
    over, apart, *_ = overhead.measure(folder / "overhead")
    assert over.floor is not None
    assert apart.floor is not None
    model_dir = folder / "model"
    model = encoder(folder, Encoder(BLOCKS, WIDTH), 2, 1, LENGTH, 4)
    ids = torch.randint(0, 1000, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.inference_mode():
        expected = model(ids, mask).numpy()[0]
    rounds: dict[str, list[float]] = {"gloo": [], "shared_memory": [], "ours": []}
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(up(folder, "encoder")).grpc
        call = predict(address, predict_request("encoder", [{"ids": ids[0].numpy(), "mask": mask[0].numpy()}]))
        error = float(np.abs(call() - expected).max())
        if error > 1e-4:
            raise AssertionError(f"max abs error {error}")
        for _ in range(ROUNDS):
            for kind in ("gloo", "shared_memory"):
                rounds[kind].append(bare(kind, model_dir, ids, mask))
            rounds["ours"].append(interleaved_p50({"ours": call}, 1, CALLS)["ours"])
    gloo, shared, ours = (statistics.median(values) * 1e3 for values in rounds.values())
    bound = GOAL * shared + over.ours - over.floor
    bound_apart = GOAL * shared + apart.ours - apart.floor
    what = f"p50, tp 2, {BLOCKS} blocks of width {WIDTH}, batch 1, length {LENGTH}"
    return [
        Row("overhead (1-rank matmul), bare gRPC echo and ours", "ms", over.floor, over.ours),
        Row(apart.name, "ms", apart.floor, apart.ours),
        Row(f"{what}; floor: bare loop over gloo", "ms", gloo, ours),
        Row(f"{what}; floor: bare loop over shared memory", "ms", shared, ours),
        Row(f"{what}; bound: {GOAL} x that + overhead", "ms", bound, ours, 1.0),
        Row("the same with the overhead of calls that are as far apart as steps", "ms", bound_apart, ours),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report("sharded", measure(Path(folder)), machine())
