"""Which parameters go together: from one that is cut to all that have to be cut with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from shardserve.export.planning.blocks import VIEWS, taken_apart
from shardserve.export.planning.probe import Outcome, Prober
from shardserve.export.sharding.emit import Value
from shardserve.export.sharding.placements import Placement, Shard
from shardserve.export.symbols import Dim, product

REACH = 80
"""How many nodes before a value are searched for the parameter that makes it."""
ROUNDS = 16
FEW = 8
"""Up to how many blocks of a fused projection are looked at one by one."""


class Grower:
    """Grows sets of placements; what was found is kept."""

    def __init__(self, probe: Prober) -> None:
        self.probe = probe
        self._variants: dict[str, tuple[Shard, ...]] = {}
        self._makers: dict[tuple[str, Shard], tuple[str, Shard] | None] = {}

    def variants(self, tensor: str) -> tuple[Shard, ...]:
        """The ways in which a tensor can be cut: each dim, and each dim in as many blocks as the model takes apart."""
        if tensor not in self._variants:
            shape = self.probe.whole(self.probe.placeholders[tensor][0]).shape
            found: dict[Shard, None] = {}
            pending = deque(Shard(dim) for dim in range(len(shape)))
            while pending:
                shard = pending.popleft()
                size = shape[shard.dim]
                if shard in found or not isinstance(size, int) or not size or not shard.divides(size, self.probe.size):
                    continue
                outcome = self.probe({tensor: shard})
                if outcome is None:
                    continue
                found[shard] = None
                if shard.blocks == 1:
                    pending += [Shard(shard.dim, blocks) for blocks in taken_apart(outcome, size, self.probe)]
                else:
                    pending += self._finer(tensor, shard, size, outcome)
            self._variants[tensor] = tuple(found)
        return self._variants[tensor]

    def _finer(self, tensor: str, shard: Shard, size: int, outcome: Outcome) -> Iterator[Shard]:
        """The same with a block taken apart further, as keys and values that are split off together: where that gathers
        less.
        """
        blocks = shard.blocks if isinstance(shard.blocks, tuple) else (size // shard.blocks,) * shard.blocks
        if len(blocks) > FEW:
            return
        for index, block in enumerate(blocks):
            for parts in taken_apart(outcome, block, self.probe):
                if not isinstance(parts, tuple):
                    parts = (block // parts,) * parts if parts <= FEW and block % parts == 0 else (block,)
                finer = Shard(shard.dim, (*blocks[:index], *parts, *blocks[index + 1 :]))
                tried = self.probe({tensor: finer}) if finer.divides(size, self.probe.size) else None
                if tried is not None and len(tried.gathers) < len(outcome.gathers):
                    yield finer

    def undivided(self, tensor: str) -> dict[int, str]:
        """Dims along which cutting a tensor leads nowhere, and why: what it makes, or takes, is viewed as a number of
        heads, say, that doesn't divide. If it is what it makes, that is all of its dims: along another it could be cut,
        for a reduction of its own, but what follows would still be computed whole.
        """
        reasons: dict[int, str] = {}
        made: set[int] = set()
        for shard in self.variants(tensor):
            outcome = self.probe({tensor: shard})
            assert outcome is not None
            views = [_undivided(self.probe, move.value, move.placement, move.taker) for move in outcome.gathers]
            if any(view is not None for view in views):
                made.add(shard.dim)
            views += [_undivided_before(self.probe, value, wanted) for value, wanted in outcome.wants]
            found = next((view for view in views if view is not None), None)
            if shard.blocks == 1 and found is not None:
                reasons[shard.dim] = found
            elif shard.dim in reasons and not any(move.taker for move in outcome.gathers):
                del reasons[shard.dim]
        makes = next((reasons[dim] for dim in reasons if dim in made), None)
        return reasons if makes is None else {shard.dim: makes for shard in self.variants(tensor)}

    def grow(self, tensor: str, shard: Shard, eager: bool) -> Outcome | None:
        """The closure: parameters of which a rank takes its part anyway are cut; so are those that make the
        activations of which it takes its part, always if `eager`, else where that costs no further collective.
        """
        outcome = self.probe({tensor: shard})
        refused: set[tuple[str, Shard]] = set()
        for _ in range(ROUNDS):
            if outcome is None:
                return None
            parameters: dict[str, Shard] = {}
            makers: dict[str, Shard] = {}
            for want in outcome.wants:
                maker = self._maker(*want)
                if maker is None or maker[0] in outcome.placements or want in refused:
                    continue
                direct = self.probe.source(want[0]) in self.probe.traced.bound
                (parameters if direct else makers).setdefault(*maker)
            if not parameters and not makers:
                return outcome
            grown = self.probe({**outcome.placements, **parameters, **makers})
            if makers and not eager and (grown is None or len(grown.moves) > len(outcome.moves)):
                free = self._free(outcome, parameters, makers)
                refused |= {want for want in outcome.wants if (self._maker(*want) or want)[0] in makers.keys() - free}
                together = {**parameters, **free}
                grown = self.probe({**outcome.placements, **together}) if together else outcome
            outcome = grown
        return outcome

    def _free(self, outcome: Outcome, parameters: Mapping[str, Shard], makers: Mapping[str, Shard]) -> dict[str, Shard]:
        """Those of `makers` that cost no further collective, one after another."""
        free: dict[str, Shard] = {}
        for name, shard in makers.items():
            tried = self.probe({**outcome.placements, **parameters, **free, name: shard})
            if tried is not None and len(tried.moves) <= len(outcome.moves):
                free[name] = shard
        return free

    def _maker(self, value: str, shard: Shard) -> tuple[str, Shard] | None:
        """The parameter that, cut so, makes `value` lie as `shard`: the nearest before it."""
        key = (value, shard)
        if key not in self._makers:
            self._makers[key] = self._search(value, shard)
        return self._makers[key]

    def _search(self, value: str, shard: Shard) -> tuple[str, Shard] | None:
        start = self.probe.source(value)
        if start is None:
            return None
        bound, tied = self.probe.traced.bound, self.probe.tied
        if start in bound:
            tensor = tied[bound[start]]
            return (tensor, shard) if self.probe({tensor: shard}) is not None else None
        seen, pending = {start}, deque([start])
        while pending and len(seen) < REACH:
            node = pending.popleft()
            for source in node.all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                if source not in bound:
                    pending.append(source)
                    continue
                tensor = tied[bound[source]]
                for variant in self.variants(tensor):
                    outcome = self.probe({tensor: variant})
                    if outcome is not None and outcome.makes.get(value) == shard:
                        return tensor, variant
        return None


def _undivided(probe: Prober, value: str, placement: Placement, taker: fx.Node | None) -> str | None:
    """That a view takes the sharded dim apart into dims that the ranks don't divide, if it does."""
    source = probe.source(value)
    if source is None or taker is None or not isinstance(placement, Shard):
        return None
    before, after = probe.whole(source), probe.whole(taker)
    if getattr(taker.target, "_opname", "") not in VIEWS or not isinstance(before, Value):
        return None
    return _apart(before.shape, after.shape, placement.dim, probe.size)


def _undivided_before(probe: Prober, value: str, wanted: Shard) -> str | None:
    """The same of a value that a view has put together."""
    view = probe.source(value)
    if view is None or getattr(view.target, "_opname", "") not in VIEWS:
        return None
    before, after = probe.whole(view.all_input_nodes[0]), probe.whole(view)
    return _apart(after.shape, before.shape, wanted.dim, probe.size)


def _apart(whole: Sequence[Dim], apart: Sequence[Dim], dim: int, ranks: int) -> str | None:
    head = product(whole[:dim])
    for index, size in enumerate(apart):
        if product(apart[:index]) == head and size != 1:
            if not isinstance(size, int) or size % ranks == 0 or size == whole[dim]:
                return None
            sizes = [part for part in apart[index:] if isinstance(part, int)]
            return f"{size} (of {whole[dim]} as {sizes}) doesn't divide into {ranks} ranks"
    return None
