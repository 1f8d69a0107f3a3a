"""Chooses among sets of placements: what spares the most for its collectives first."""

from __future__ import annotations

import heapq
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shardserve.errors import ExportError
from shardserve.export.cost import nbytes
from shardserve.export.planning.grow import Grower
from shardserve.export.planning.probe import Move, Outcome, Placements, Prober
from shardserve.export.sharding.placements import Replicate, Shard

ENOUGH = 1.1, 1.1
"""A rank's shares of bytes and of FLOPs, over total / ranks, at which no further collective is paid for less."""
NEARLY = 1.12, 1.15
"""The same, for sets that spare little for their collectives: poolers, classifiers, which a hand leaves whole."""
WORTH = 0.33
"""What a set has to spare for its collectives, of bytes or of FLOPs, over what those chosen before spare for theirs;
or, where that is less, what part of a rank's excess over its equal share, times its part of the collectives with it.

Of one or the other: a large embedding's lookup spares many bytes for one collective and no FLOPs, layers spare FLOPs.
"""
PASSES = 3
_NUMBER = r"(?<![^.])\d+(?![^.])"
_GATHER = 2.0
"""Collectives that a gather inside the model counts as: what follows it is computed whole, by every rank."""


@dataclass(frozen=True)
class Candidate:
    """A set of placements and what it leads to alone."""

    placements: Placements
    outcome: Outcome


@dataclass
class Choice:
    """What was chosen; `candidates`: all that were thought of."""

    placements: dict[str, Shard]
    outcome: Outcome
    candidates: list[Candidate] = field(default_factory=list)


class Scorer:
    """What placements spare and what they cost."""

    def __init__(self, probe: Prober) -> None:
        self.probe = probe
        tensors = probe.traced.tensors
        self.bytes = {name: tensors[name].nbytes for name in probe.placeholders}
        self.total_bytes = sum(self.bytes.values()) or 1
        self.total_flops = sum(probe.node_flops.values()) or 1
        self._typical = self._typical_bytes()

    def _typical_bytes(self) -> float:
        """The bytes of a result of a matrix product, to weigh collectives' bytes by."""
        values = [self.probe.whole(node) for node, flops in self.probe.node_flops.items() if flops]
        sizes = [self.probe.sizes(nbytes(x.shape, x.dtype)) for x in values if not isinstance(x, list)]
        return float(statistics.median(sizes)) if sizes else 1.0

    def spared(self, outcome: Outcome) -> float:
        """The parts of all parameter bytes and of all FLOPs that each rank is spared."""
        return sum(self.shares(outcome))

    def shares(self, outcome: Outcome) -> tuple[float, float]:
        """Both parts, each from 0 to 1."""
        return self.spared_bytes(outcome.placements) / self.total_bytes, outcome.flops / self.total_flops

    def spared_bytes(self, placements: Placements) -> float:
        return sum(self.bytes[tensor] for tensor in placements) * (1 - 1 / self.probe.size)

    def price(self, outcome: Outcome) -> float:
        """The collectives, each counting 1 to 2 by its bytes."""
        return sum(self._price(move) for move in outcome.moves)

    def _price(self, move: Move) -> float:
        size = self.probe.size
        taken = move.nbytes * (size - 1) * (2 / size if move.kind == "all_reduce" else 1)
        inside = move.kind == "all_gather" and move.taker is not None
        return (1 + taken / (taken + self._typical)) * (_GATHER if inside else 1)

    def worth(self, outcome: Outcome) -> float:
        """What is spared for each collective."""
        return self.spared(outcome) / max(self.price(outcome), 1e-6)

    def excess(self, outcome: Outcome) -> tuple[float, float]:
        """A rank's bytes and FLOPs over total / ranks, less 1."""
        left_bytes = 1 - self.spared_bytes(outcome.placements) / self.total_bytes
        left_flops = 1 - outcome.flops / self.total_flops if any(self.probe.node_flops.values()) else 0.0
        return left_bytes * self.probe.size - 1, left_flops * self.probe.size - 1

    def enough(self, outcome: Outcome, limits: tuple[float, float] = ENOUGH) -> bool:
        """Whether a rank's shares are about total / ranks."""
        return all(over <= limit - 1 for over, limit in zip(self.excess(outcome), limits, strict=True))


def grouped(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[tuple[object, ...], list[str]]:
    """Tensors that are the same one of each layer of a stack: alike but for numbers in their names."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        tensor = tensors[name]
        groups.setdefault((pattern(name), tuple(tensor.shape), tensor.dtype), []).append(name)
    return groups


def pattern(name: str, literal: int = 0) -> str:
    """The name with * for the numbers of modules in lists, all but the last `literal` of them."""
    numbers = re.findall(_NUMBER, name)
    return re.sub(_NUMBER, "*", name, count=len(numbers) - literal) if len(numbers) > literal else name


def candidates(probe: Prober, scorer: Scorer, fixed: Mapping[str, Replicate | Shard]) -> list[Candidate]:
    """Sets of placements that go together, each grown from one parameter and carried over to a stack's other layers."""
    grower = Grower(probe)
    tensors = probe.traced.tensors
    groups = grouped(tensors, [name for name in probe.placeholders if name not in fixed])
    members = {name: group for group in groups.values() for name in group}
    found: dict[frozenset[tuple[str, Shard]], Candidate] = {}

    def add(outcome: Outcome) -> None:
        found.setdefault(frozenset(outcome.placements.items()), Candidate(outcome.placements, outcome))

    for group in groups.values():
        if tensors[group[0]].ndim < 2:
            continue
        apart = False
        for outcome in _grown(grower, group[0]):
            lifted = _lifted(probe, outcome, members)
            if lifted is not None and scorer.worth(lifted) >= 0.9 * scorer.worth(outcome):
                add(lifted)
            else:
                add(outcome)
                apart = True
        if apart:
            for name in group[1:]:
                for outcome in _grown(grower, name):
                    add(outcome)
    return list(found.values())


def _grown(grower: Grower, tensor: str) -> Iterator[Outcome]:
    undivided = grower.undivided(tensor)
    for shard in grower.variants(tensor):
        if shard.dim in undivided:
            continue
        for eager in (True, False):
            outcome = grower.grow(tensor, shard, eager)
            if outcome is not None and grower.probe.sound(outcome):
                yield outcome


def _lifted(probe: Prober, outcome: Outcome, members: Mapping[str, Sequence[str]]) -> Outcome | None:
    """The same for all layers; None where tensors of one group are cut differently."""
    placements: dict[str, Shard] = {}
    for tensor, shard in outcome.placements.items():
        for member in members.get(tensor, (tensor,)):
            if placements.setdefault(member, shard) != shard:
                return None
    return probe(placements)


def choose(probe: Prober, fixed: Mapping[str, Replicate | Shard]) -> Choice:
    """The placements of everything that isn't in `fixed`."""
    scorer = Scorer(probe)
    given = {name: placement for name, placement in fixed.items() if isinstance(placement, Shard)}
    start = probe(given)
    if start is None:
        raise ExportError(
            f"the plan's placements don't fit together on {probe.size} ranks: what they make doesn't divide"
        )
    choice = Choice(given, start, candidates(probe, scorer, fixed))
    chosen: list[Candidate] = []
    _take(scorer, choice, chosen, fixed, little=False)  # and so what costs nothing with these, too
    for _ in range(PASSES):  # what was worth too little of a large excess may be worth enough of a small one
        before = len(chosen)
        _take(scorer, choice, chosen, fixed, little=True)
        if len(chosen) == before or scorer.enough(choice.outcome):
            break
    _drop(scorer, choice, chosen)
    return choice


def _take(
    scorer: Scorer, choice: Choice, chosen: list[Candidate], fixed: Mapping[str, Replicate | Shard], little: bool
) -> None:
    """Goes once through the candidates, what spares the most for its collectives first; `little`: also the others."""
    order = [(-scorer.worth(candidate.outcome), index, -1) for index, candidate in enumerate(choice.candidates)]
    heapq.heapify(order)
    while order:
        worth, index, seen = heapq.heappop(order)
        candidate = choice.candidates[index]
        if any(fixed.get(name, choice.placements.get(name, shard)) != shard
               for name, shard in candidate.placements.items()):  # fmt: skip
            continue
        outcome = scorer.probe({**choice.placements, **candidate.placements})
        if outcome is None or len(outcome.placements) == len(choice.placements):
            continue
        gained = scorer.shares(choice.outcome)
        gains = [new - old for new, old in zip(scorer.shares(outcome), gained, strict=True)]
        gain = sum(gains)
        paid, price = scorer.price(choice.outcome), scorer.price(outcome) - scorer.price(choice.outcome)
        if gain <= 0:
            continue
        if price > 0 and -gain / price > worth * 0.99 and seen != len(chosen):
            heapq.heappush(order, (-gain / price, index, len(chosen)))  # among those chosen it is worth less
            continue
        if price > 0:
            spares_little = paid > 0 and _little(gains, price, gained, paid)
            left = sum(scorer.excess(choice.outcome)) / scorer.probe.size
            if spares_little and (not little or gain / price < WORTH * left / (paid + price)):
                continue
            if scorer.enough(choice.outcome, NEARLY if spares_little else ENOUGH):
                continue
        choice.placements, choice.outcome = {**choice.placements, **candidate.placements}, outcome
        chosen.append(candidate)


def _little(gains: Sequence[float], price: float, gained: Sequence[float], paid: float) -> bool:
    """Whether both what a set spares of bytes and what it spares of FLOPs is little beside those chosen before."""
    return all(gain < 1e-9 or gain / price < WORTH * before / paid for gain, before in zip(gains, gained, strict=True))


def _drop(scorer: Scorer, choice: Choice, chosen: list[Candidate]) -> None:
    """Leave out what, after all, costs a collective and isn't needed for a rank's share to be about total / ranks."""
    for candidate in sorted(chosen, key=lambda candidate: scorer.worth(candidate.outcome)):
        others = {name for other in chosen if other is not candidate for name in other.placements}
        rest = {name: shard for name, shard in choice.placements.items()
                if name in others or name not in candidate.placements}  # fmt: skip
        outcome = scorer.probe(rest)
        if outcome is not None and scorer.enough(outcome) and scorer.price(outcome) < scorer.price(choice.outcome):
            choice.placements, choice.outcome = rest, outcome
            chosen.remove(candidate)
