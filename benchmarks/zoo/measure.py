"""One model in its layouts: exported, run from its files at several sizes, compared, counted."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from benchmarks.zoo.registry import Case
from shardserve.errors import ExportError
from shardserve.export import export, verify
from shardserve.export.refusals import explain
from shardserve.export.tracing import recurrent
from shardserve.export.tracing.trace import evaluating, ordered
from shardserve.shards import summary
from shardserve.shards.summary import RankSummary

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2pp2": (2, 2), "tp4": (4, 1)}
"""Tensor-parallel ranks x pipeline stages."""

MOST_BYTES = 1.15
MOST_FLOPS = 1.2
MOST_REPLICATED = 0.99
"""Of the model's bytes, from which on it counts as not sharded."""


@dataclass(frozen=True)
class Row:
    """error: the largest of an output's element, divided by the largest magnitude in that output, over all `sizes`
    sizes of the dynamic dims. hand: what the hand-written plan issues of collectives. bytes and flops: the sum over all
    ranks / what the whole model has, so 1 is the ideal; *_largest: the same if all ranks were as the one that has the
    most. replicated: the part of the whole model's bytes that all tensor-parallel ranks hold; why: of each parameter.
    twice: the part of the whole model's bytes that further pipeline stages hold once more.
    """

    model: str
    layout: str
    failure: str | None = None
    matches: bool = False
    error: float = 0.0
    sizes: int = 0
    collectives: int = 0
    hand: int | None = None
    bytes: float = 0.0
    bytes_largest: float = 0.0
    flops: float = 0.0
    flops_largest: float = 0.0
    replicated: float = 0.0
    twice: float = 0.0
    why: tuple[str, ...] = ()
    trace_seconds: float = 0.0
    missed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Traced:
    """A model traced once for all layouts, and its export for a single rank, which is the whole."""

    program: ExportedProgram
    seconds: float
    whole: RankSummary


def rows(name: str, case: Case, layouts: Sequence[str]) -> list[Row]:
    """The layouts that the model's heads allow; what goes wrong is in the row."""
    wanted = [layout for layout in layouts if LAYOUTS[layout][0] in (1, *case.tensor_parallel)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            traced = trace(case, Path(folder))
        except ExportError as error:
            return [Row(name, layout, failure=str(error), missed=("not exported",)) for layout in wanted]
        return [measure(name, case, layout, traced, Path(folder)) for layout in wanted]


def trace(case: Case, folder: Path) -> Traced:
    """torch.export.export once; `export` takes the program instead of tracing again."""
    started = time.perf_counter()
    kwargs = ordered(case.model, case.kwargs)
    with evaluating(case.model):
        try:
            with recurrent.Kept():
                program = torch.export.export(case.model, (), kwargs, dynamic_shapes=dict(case.dynamic_shapes))
        except Exception as error:
            raise ExportError(explain(error, case.model, (), kwargs)) from error
    seconds = time.perf_counter() - started
    _export(case, program, folder, 1, 1)
    return Traced(program, seconds, summary.read(folder).ranks[0])


def _export(case: Case, program: ExportedProgram, folder: Path, tensor_parallel: int, pipeline_parallel: int) -> Any:
    return export(
        case.model,
        (),
        name="zoo",
        out=folder,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        kwargs=case.kwargs,
        dynamic_shapes=dict(case.dynamic_shapes),
        program=program,
    )


def measure(name: str, case: Case, layout: str, traced: Traced, folder: Path) -> Row:
    """Exports, verifies and counts one layout."""
    tensor_parallel, pipeline_parallel = LAYOUTS[layout]
    hand = case.hand(tensor_parallel)
    try:
        report = _export(case, traced.program, folder, tensor_parallel, pipeline_parallel)
        # Judged below by each output's own scale.
        result = verify(case.model, (), case.kwargs, folder, "zoo", atol=float("inf"))
    except ExportError as error:
        return Row(name, layout, failure=str(error), hand=hand, missed=("not exported",))
    worst = max(output.max_relative for output in result.outputs)
    ranks, whole = summary.read(folder).ranks, traced.whole
    held, flops = [_held(rank) for rank in ranks], [rank.flops or 0 for rank in ranks]
    most, all_flops = len(ranks) / _held(whole), whole.flops or 1
    row = Row(
        name,
        layout,
        None,
        worst <= case.tolerance,
        worst,
        len(result.sizes),
        sum(report.collectives().values()),
        hand,
        sum(held) / _held(whole),
        max(held) * most,
        sum(flops) / all_flops,
        max(flops) * len(ranks) / all_flops,
        _replicated(ranks, tensor_parallel, whole),
        _twice(ranks, tensor_parallel, whole),
        report.replicated or (),
        traced.seconds,
    )
    return replace(row, missed=tuple(_missed(row, case, tensor_parallel)))


def _held(rank: RankSummary) -> int:
    """Bytes of weights, and of the buffers that are kept between steps."""
    return rank.config.parameter_bytes + rank.state_bytes


def _replicated(ranks: Sequence[RankSummary], tensor_parallel: int, whole: RankSummary) -> float:
    """The part of the whole's bytes that is whole on a rank."""
    if tensor_parallel == 1:
        return 0.0
    names: set[str] = set()
    for rank in ranks:
        names |= {
            name for name, parameter in rank.stored.items()
            if name in whole.stored and parameter.shape == whole.stored[name].shape
        }  # fmt: skip
    return sum(summary.parameter_bytes(whole.stored[name]) for name in names) / _held(whole)


def _twice(ranks: Sequence[RankSummary], tensor_parallel: int, whole: RankSummary) -> float:
    """The part of the whole's bytes that is in a stage after another that has it: tied weights, used in both."""
    seen: Counter[str] = Counter(name for rank in ranks[::tensor_parallel] for name in rank.stored)
    again = (count - 1 for name, count in seen.items() if name in whole.stored)
    sizes = (summary.parameter_bytes(whole.stored[name]) for name in seen if name in whole.stored)
    return sum(count * size for count, size in zip(again, sizes, strict=True)) / _held(whole)


def _missed(row: Row, case: Case, tensor_parallel: int) -> list[str]:
    missed = [] if row.matches else ["differs"]
    if tensor_parallel > 1:
        if row.replicated > MOST_REPLICATED:
            missed.append("not sharded")
        if row.hand is not None and row.collectives > row.hand:
            missed.append("collectives")
        if case.bounded and row.bytes > MOST_BYTES:
            missed.append("bytes" if row.bytes - row.twice > MOST_BYTES else "bytes: tied weights lie in both stages")
        if case.bounded and row.flops > MOST_FLOPS:
            missed.append("FLOPs")
    return missed
