"""What stays whole, and why."""

from __future__ import annotations

from collections.abc import Sequence

from shardserve.export.cut import modules
from shardserve.export.placements import Shard
from shardserve.export.planning.choose import Choice, Scorer, grouped, pattern
from shardserve.export.planning.grow import Grower
from shardserve.export.planning.probe import Move, Prober
from shardserve.export.symbols import product

NOTABLE = 0.005
"""The part of all parameter bytes from which on a group of parameters that stays whole is named."""


def replicated(probe: Prober, choice: Choice) -> tuple[str, ...]:
    """A line for each group of parameters that every rank has whole, the largest first, and one for the small ones."""
    scorer, grower = Scorer(probe), Grower(probe)
    names = [name for name in probe.placeholders if name not in choice.placements]
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
    undivided = _undivided(probe, variants, name)
    if undivided:
        return undivided
    if len(shape) < 2:
        return "added or multiplied whole"
    thought = [candidate for candidate in choice.candidates if name in candidate.placements]
    if not thought:
        return "no operator that takes it has a rule for its parts"
    best = max(thought, key=lambda candidate: scorer.worth(candidate.outcome))
    if any(choice.placements.get(other, shard) != shard for other, shard in best.placements.items()):
        return "what it would be cut with is cut otherwise"
    gathers = [move for move in best.outcome.gathers if move.taker is not None]
    where = f", for {_operator(gathers[0])}" if gathers else ""
    count = len(best.outcome.moves)
    part = scorer.spared_bytes(best.placements) / scorer.total_bytes
    return f"cutting it would cost {count} more collective{'s' * (count != 1)}{where}, for {part:.1%} of the parameters"


def _undivided(probe: Prober, variants: Sequence[Shard], name: str) -> str | None:
    """A dim that a view takes apart into one that the ranks don't divide: heads, mostly."""
    for shard in variants:
        outcome = probe({name: shard})
        for move in outcome.gathers if outcome is not None and shard.blocks == 1 else ():
            node, source = move.taker, probe.source(move.value)
            if node is None or source is None or getattr(node.target, "_opname", "") not in ("view", "reshape"):
                continue
            before, after = probe.whole(source).shape, probe.whole(node).shape
            dim = move.placement.dim if isinstance(move.placement, Shard) else 0
            head = product(before[:dim])
            for index, size in enumerate(after):
                if product(after[:index]) == head and size != 1 and isinstance(size, int) and size % probe.size:
                    return f"{size} (of {before[dim]} as {list(after[index:])}) doesn't divide into {probe.size} ranks"
    return None


def _operator(move: Move) -> str:
    assert move.taker is not None
    inside = modules(move.taker)
    return f"{getattr(move.taker.target, '_opname', move.taker.name)}{f' in {inside[-1]}' if inside else ''}"
