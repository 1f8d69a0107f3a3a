"""What stays whole, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shardserve.export.planning.choose import Choice, Scorer, grouped, pattern
from shardserve.export.planning.grow import Grower
from shardserve.export.planning.probe import Move, Prober
from shardserve.export.sharding.cut import modules

NOTABLE = 0.005
"""The part of all parameter bytes from which on a group of parameters that stays whole is named."""


def replicated(probe: Prober, choice: Choice, kept: Collection[str] = ()) -> tuple[str, ...]:
    """A line for each group of parameters that every rank has whole, the largest first, and one for the small ones;
    none for those in `kept`.
    """
    scorer, grower = Scorer(probe), Grower(probe)
    names = [name for name in probe.placeholders if name not in choice.placements and name not in kept]
    groups = sorted(grouped(probe.traced.tensors, names).values(), key=lambda group: -_bytes(scorer, group))
    lines: list[str] = []
    small = 0
    for group in groups:
        nbytes = _bytes(scorer, group)
        if nbytes < NOTABLE * scorer.total_bytes:
            small += nbytes
            continue
        name = pattern(group[0]) if len(group) > 1 else group[0]
        lines.append(f"{name} ({nbytes / scorer.total_bytes:.1%}): {_reason(probe, scorer, grower, choice, group[0])}")
    if small:
        lines.append(f"all others ({small / scorer.total_bytes:.1%}): small")
    return tuple(lines)


def _bytes(scorer: Scorer, group: Sequence[str]) -> int:
    return sum(scorer.bytes[name] for name in group)


def _reason(probe: Prober, scorer: Scorer, grower: Grower, choice: Choice, name: str) -> str:
    variants = grower.variants(name)
    shape = list(probe.traced.tensors[name].shape)
    if not variants:
        sizes = " and ".join(map(str, shape))
        what = (
            f"{sizes} {'does' if len(shape) == 1 else 'do'}n't divide into {probe.size} ranks" if shape else "a number"
        )
        return f"its {what}" if shape else what
    undivided = grower.undivided(name)
    if undivided:
        return next(iter(undivided.values()))
    if len(shape) < 2:
        return "a vector that is used whole"
    thought = [candidate for candidate in choice.candidates if name in candidate.placements]
    if not thought:
        tried = probe({name: variants[0]})
        takers = [move for move in tried.gathers if move.taker is not None] if tried is not None else []
        return f"{_operator(takers[0])} takes it whole" if takers else "no operator that takes it takes parts of it"
    chosen = choice.placements
    fitting = [
        candidate
        for candidate in thought
        if all(chosen.get(other, shard) == shard for other, shard in candidate.placements.items())
    ]
    if not fitting:
        return "what it would be cut with is cut otherwise"
    best = max(fitting, key=lambda candidate: scorer.worth(candidate.outcome))
    gathers = [move for move in best.outcome.gathers if move.taker is not None]
    where = f", for {_operator(gathers[0])}" if gathers else ""
    count = len(best.outcome.moves)
    part = scorer.spared_bytes(best.placements) / scorer.total_bytes
    return f"cutting it would cost {count} more collective{'s' * (count != 1)}{where}, for {part:.1%} of the parameters"


def _operator(move: Move) -> str:
    assert move.taker is not None
    inside = modules(move.taker)
    return f"{getattr(move.taker.target, '_opname', move.taker.name)}{f' in {inside[-1]}' if inside else ''}"
