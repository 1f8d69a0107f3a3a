"""What an export did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardserve.amounts import of_bytes, of_flops, of_seconds
from shardserve.export.cost import Sizes, distinct, nbytes
from shardserve.export.layouts.choice import Candidate
from shardserve.export.layouts.layout import Layout
from shardserve.export.planning.plan import Plan
from shardserve.export.sharding.cut import StageGraph
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.writing.assemble import RankShard
from shardserve.shards.config import Signature, TensorSpec, describe


@dataclass(frozen=True)
class RankReport:
    """One rank of a stage: how many numbers its parameters are, their bytes, the FLOPs of its matrix products in a step
    at the example's sizes, and the most bytes that a step's tensors take at once at the largest size of each dim.
    """

    parameters: int
    parameter_bytes: int
    flops: int
    activation_bytes: int


@dataclass(frozen=True)
class StageReport:
    """One pipeline stage: the collectives of each step in order, with the bytes that a rank gives to each, what it
    sends, and the bytes of each of those, at the example's sizes; its ranks; the part of its parameters' bytes that
    every rank has; the buffers that its first rank keeps between steps.
    """

    collectives: tuple[str, ...]
    collective_bytes: tuple[int, ...]
    sends: tuple[TensorSpec, ...]
    send_bytes: tuple[int, ...]
    ranks: tuple[RankReport, ...]
    replicated: float
    state: tuple[TensorSpec, ...] = ()

    @property
    def parameter_bytes(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(rank.parameter_bytes for rank in self.ranks)

    def __str__(self) -> str:
        counts = Counter(self.collectives)
        collectives = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no collectives"
        if self.collectives:
            collectives += f" ({of_bytes(sum(self.collective_bytes))})"
        weights = _range([rank.parameter_bytes for rank in self.ranks], of_bytes)
        numbers = _range([rank.parameters for rank in self.ranks], str)
        shared = f" ({self.replicated:.0%} of the stage's on every rank)" if len(self.ranks) > 1 else ""
        flops = _range([rank.flops for rank in self.ranks], of_flops)
        tensors = _range([rank.activation_bytes for rank in self.ranks], of_bytes)
        return (
            f"{collectives}; a rank has {numbers} parameters, {weights}{shared}, makes {flops} FLOPs and holds at most "
            f"{tensors} of tensors"
        )


def stage_reports(layout: Layout, shards: Sequence[Sequence[RankShard]]) -> tuple[StageReport, ...]:
    """What each stage's ranks hold, compute and send; `shards` are the layout's."""
    example, largest = Sizes.example(layout.traced), Sizes.largest(layout.traced)
    activations = layout.activation_bytes(largest)
    reports: list[StageReport] = []
    for index, ranks in enumerate(shards):
        costs, parts = layout.costs[index], layout.stages[index]
        stored = [shard.layout.values() for shard in ranks]
        ranked = tuple(
            RankReport(
                sum(math.prod(shape) for _, shape in tensors),
                sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors),
                example(costs[coordinate].flops),
                activations[index][coordinate],
            )
            for coordinate, tensors in enumerate(stored)
        )
        reports.append(
            StageReport(
                collectives=ranks[0].collectives,
                collective_bytes=tuple(example(nbytes) for _, nbytes in costs[0].collectives),
                sends=ranks[0].config.sends,
                send_bytes=tuple(example(nbytes) for nbytes in costs[0].sends.values()),
                ranks=ranked,
                replicated=_replicated(layout, parts[0]),
                state=ranks[0].config.state,
            )
        )
    return tuple(reports)


def _replicated(layout: Layout, stage: StageGraph) -> float:
    """The part of a stage's parameter bytes, each counted once, that isn't cut."""
    whole = cut = 0
    for bound in distinct(stage.parameters, layout.traced.tensors):
        held = int(nbytes(bound.shape, bound.dtype))
        whole += held if isinstance(bound.placement, Replicate) else 0
        cut += held * layout.tensor_parallel if isinstance(bound.placement, Shard) else 0
    return whole / (whole + cut) if whole + cut else 0.0


def _range(values: Sequence[int], described: Callable[[int], str]) -> str:
    """One value, or the smallest and the largest."""
    least, most = described(min(values)), described(max(values))
    return least if least == most else f"{least} to {most}"


@dataclass(frozen=True)
class Report:
    """What was written, or, if `out` is None, would be. `gathered`: operators that had no rule for their inputs'
    placements and took whole tensors, with how often; `conditions` of the signature are what tracing assumed beyond the
    declared ranges. `plan` is the one given or found; `replicated`: of one that was found, what stays whole and why.
    `latency` and `interval`: seconds of a step at the example's sizes and between two of a full pipeline, by the cost
    model; `compared`: the layouts that were thought of, the chosen one first. `fixed`: the inputs that aren't tensors,
    which are part of the graph as the example has them.
    """

    name: str
    out: Path | None
    export_id: str
    rank_size: int
    stage_size: int
    signature: Signature
    cuts: tuple[str, ...]
    stages: tuple[StageReport, ...]
    gathered: Mapping[str, int]
    warnings: tuple[str, ...]
    trace_seconds: float
    seconds: float
    plan: Plan = field(default_factory=Plan)
    replicated: tuple[str, ...] | None = None
    latency: float = 0.0
    interval: float = 0.0
    compared: tuple[Candidate, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def collectives(self) -> Counter[str]:
        """How many of each kind of collective a step issues, over all stages."""
        return Counter(kind for stage in self.stages for kind in stage.collectives)

    def __str__(self) -> str:
        stages = f"{self.stage_size} pipeline stage{'s' * (self.stage_size > 1)}"
        ranks = f"{self.rank_size} rank{'s' * (self.rank_size > 1)}, {stages}"
        where = "nothing written" if self.out is None else f"in {self.out}"
        lines = [f"{self.name}: {ranks}, {where} ({self.seconds:.1f} s, {self.trace_seconds:.1f} s of it tracing)"]
        lines += [f"  {'chosen' if not index else 'or'} {candidate}" for index, candidate in enumerate(self.compared)]
        lines += [f"  input {_line(spec)}" for spec in self.signature.inputs]
        lines += [f"  input {name}: fixed to {value!r}, as it isn't a tensor" for name, value in self.fixed.items()]
        lines += [f"  dim {name}: {interval}" for name, interval in self.signature.dims.items()]
        lines += [f"  only where {condition}" for condition in self.signature.conditions]
        for index, stage in enumerate(self.stages):
            begin = f" from '{self.cuts[index - 1]}'" if index else ""
            lines.append(f"  stage {index}{begin}: {stage}")
            lines += [f"    keeps {_line(spec)}" for spec in stage.state]
            if index < self.stage_size - 1:
                sent = zip(stage.sends, stage.send_bytes, strict=True)
                lines += [f"    sends {_line(spec)} ({of_bytes(size)})" for spec, size in sent]
        lines += [f"  output {_line(spec)}" for spec in self.signature.outputs]
        if any(stage.state for stage in self.stages):
            lines.append("  it keeps buffers between steps: for declare_servable(…, stateful=True) only")
        steps = f", one each {of_seconds(self.interval)}" if self.stage_size > 1 else ""
        lines.append(f"  a step in about {of_seconds(self.latency)}{steps}, by the cost model, for the example")
        lines += [f"  {placement}: {', '.join(names)}" for placement, names in self._placed().items()]
        lines += [f"  replicated: {line}" for line in self.replicated or ()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _placed(self) -> dict[str, list[str]]:
        """Placement → what of an automatic plan is cut so."""
        placed: dict[str, list[str]] = {}
        for pattern, placement in () if self.replicated is None else self.plan.parameters.items():
            placed.setdefault(placement, []).append(pattern)
        return placed


def _line(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} {describe(spec.shape)}"
