"""`make bench-layouts`: the cost model's order of layouts beside the measured one, served, one core for each rank.

What `shardserve export --ranks` chooses by: for each model tp 1, tp 2 and pp 2, a step alone. `floor` is the predicted
time; the server's own milliseconds are in the measured one alone, the same in each layout.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks.load import interleaved_p50, predict, predict_request
from benchmarks.models import BLOCKS_PLAN, Encoder, encoder
from benchmarks.report import Row, machine, report
from benchmarks.servers import up
from shardserve.export import Plan
from shardserve.export.cost import Sizes
from shardserve.export.layouts.layout import Planner
from shardserve.export.tracing.trace import trace

LAYOUTS = {"tp 1": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2)}
MODELS = {"small": (2, 64, 16), "middle": (8, 256, 64), "large": (4, 768, 64)}
"""Blocks, width, length."""
ROUNDS, CALLS = 5, 40
GOAL = 0.8


def predicted(blocks: int, width: int, length: int) -> list[float]:
    """Seconds of a step of one instance in each layout."""
    ids = torch.zeros(3, length, dtype=torch.long)
    dims = {0: torch.export.Dim("batch", min=1, max=4)}
    traced = trace(Encoder(blocks, width), (ids, ids == 0), {}, {"ids": dims, "mask": dims}, None, None)
    model = Encoder(blocks, width)
    planners = {tp: Planner(model, {"": traced}, Plan(BLOCKS_PLAN if tp > 1 else {})) for tp in (1, 2)}
    sizes = Sizes.at(traced, {"batch": 1})
    return [planners[tp].lay_out(tp, pp)[""].latency(sizes) for tp, pp in LAYOUTS.values()]


def measured(folder: Path, blocks: int, width: int, length: int) -> list[float]:
    """Median seconds of a call, of all layouts in turn."""
    ids = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(2)).numpy()
    request = predict_request("encoder", [{"ids": ids, "mask": np.ones(length, dtype=bool)}])
    found: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    with ExitStack() as stack:
        calls = {}
        for layout, (tp, pp) in LAYOUTS.items():
            place = folder / layout.replace(" ", "")
            place.mkdir()
            encoder(place, Encoder(blocks, width), tp, pp, length, 4, max_batch_size=1)
            address = stack.enter_context(up(place, "encoder", SHARDSERVE_AGENT_THREADS="1")).grpc
            calls[layout] = predict(address, request)
        for _ in range(ROUNDS):
            for layout, seconds in interleaved_p50(calls, 1, CALLS).items():
                found[layout].append(seconds)
    return [statistics.median(values) for values in found.values()]


def correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of lists without equal values."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.asarray(np.corrcoef(np.stack(ranks)))[0, 1])


def measure(folder: Path) -> list[Row]:
    rows: list[Row] = []
    expected: list[float] = []
    found: list[float] = []
    for name, shape in MODELS.items():
        (folder / name).mkdir()
        times = predicted(*shape), measured(folder / name, *shape)
        for layout, by_model, by_clock in zip(LAYOUTS, *times, strict=True):
            rows.append(Row(f"{name}, {layout}; floor: predicted", "ms", by_model * 1e3, by_clock * 1e3))
        rows.append(Row(f"{name}: rank correlation of the layouts", "", None, correlation(*times)))
        expected, found = expected + times[0], found + times[1]
    return [*rows, Row("rank correlation of all", "", None, correlation(expected, found), at_least=GOAL)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("layouts", measure(Path(name)), machine())
