"""`make bench-window`: what `steps_ahead` does to a pipeline's throughput and latency, and to a batching rank's.

Two stages of some 10 ms, and one rank that batches; a server for each value, all driven in turns. No floor: the default
is the smallest value after which throughput grows no more.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch

from benchmarks.load import interleaved_p50, interleaved_throughput, predict, predict_request
from benchmarks.models import Encoder, encoder
from benchmarks.report import Row, machine, report
from benchmarks.servers import up
from shardserve.settings import Settings

AHEAD = (1, 2, 4)
BLOCKS, WIDTH, LENGTH = 8, 320, 64
CLIENTS = {"two stages, batches of 1": 8, "one stage, batches of up to 8": 32}
ROUNDS = 5
SECONDS = 3.0
CALLS = 30


def measure(folder: Path) -> list[Row]:
    ids = torch.randint(0, 1000, (LENGTH,)).numpy()
    request = predict_request("encoder", [{"ids": ids, "mask": ids >= 0}])
    rows = []
    for (what, clients), stages, batch in zip(CLIENTS.items(), (2, 1), (1, 8), strict=True):
        models = folder / f"pp{stages}"
        models.mkdir()
        encoder(models, Encoder(BLOCKS, WIDTH), 1, stages, LENGTH, 8, max_batch_size=batch)
        with contextlib.ExitStack() as stack:
            addresses = {
                str(ahead): stack.enter_context(
                    up(models, "encoder", SHARDSERVE_STEPS_AHEAD=str(ahead), SHARDSERVE_AGENT_THREADS="1")
                ).grpc
                for ahead in AHEAD
            }
            makes = {ahead: lambda at=address: predict(at, request) for ahead, address in addresses.items()}
            rates = interleaved_throughput(makes, ROUNDS, clients, SECONDS)
            alone = interleaved_p50({ahead: make() for ahead, make in makes.items()}, ROUNDS, CALLS)
        base = rates[str(Settings().steps_ahead)]
        for ahead in AHEAD:
            here = f"{what}, {ahead} steps ahead"
            rows.append(Row(f"{here}, {clients} clients; beside the default", "req/s", base, rates[str(ahead)]))
            rows.append(Row(f"{here}, 1 client", "ms", None, alone[str(ahead)] * 1e3))
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("window", measure(Path(name)), machine())
