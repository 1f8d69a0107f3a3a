"""What an export did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardserve.export.plan import Plan
from shardserve.shards.config import Signature, TensorSpec, describe


@dataclass(frozen=True)
class StageReport:
    """One pipeline stage: the collectives of each step in order, what it sends, the bytes of weights on each rank, the
    buffers that its first rank keeps between steps."""

    collectives: tuple[str, ...]
    sends: tuple[TensorSpec, ...]
    parameter_bytes: tuple[int, ...]
    state: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was written. `gathered`: operators that had no rule for their inputs' placements and took whole tensors,
    with how often; `conditions` of the signature are what tracing assumed beyond the declared ranges. `plan` is the one
    given or found; `replicated`: of one that was found, what stays whole and why.
    """

    name: str
    out: Path
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

    def collectives(self) -> Counter[str]:
        """How many of each kind of collective a step issues, over all stages."""
        return Counter(kind for stage in self.stages for kind in stage.collectives)

    def __str__(self) -> str:
        stages = f"{self.stage_size} pipeline stage{'s' * (self.stage_size > 1)}"
        ranks = f"{self.rank_size} rank{'s' * (self.rank_size > 1)}, {stages}"
        lines = [
            f"{self.name}: {ranks}, in {self.out} ({self.seconds:.1f} s, {self.trace_seconds:.1f} s of it tracing)"
        ]
        lines += [f"  input {_line(spec)}" for spec in self.signature.inputs]
        lines += [f"  dim {name}: {interval}" for name, interval in self.signature.dims.items()]
        lines += [f"  only where {condition}" for condition in self.signature.conditions]
        for index, stage in enumerate(self.stages):
            counts = Counter(stage.collectives)
            collectives = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no collectives"
            megabytes = max(stage.parameter_bytes) / 1e6
            begin = f" from '{self.cuts[index - 1]}'" if index else ""
            lines.append(f"  stage {index}{begin}: {collectives}; {megabytes:.3g} MB of weights on a rank")
            lines += [f"    keeps {_line(spec)}" for spec in stage.state]
            lines += [f"    sends {_line(spec)}" for spec in stage.sends if index < self.stage_size - 1]
        lines += [f"  output {_line(spec)}" for spec in self.signature.outputs]
        if any(stage.state for stage in self.stages):
            lines.append("  it keeps buffers between steps: for declare_servable(…, stateful=True) only")
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
