"""Tries placements of a few parameters on the traced graph, by the rules, without making a rank's graph.

Only what becomes sharded is looked at: a node whose operands are all whole gives what it gives without any placement.
So a try costs as much as the region between the parameters and the collectives that end it.
"""

from __future__ import annotations

import heapq
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from shardserve.export import cost
from shardserve.export.sharding.emit import Emitter, LocalNode, Scalar, Unplaceable, Value
from shardserve.export.sharding.placements import Partial, Placement, Replicate, Shard
from shardserve.export.sharding.propagate import emit, settled
from shardserve.export.symbols import Dim, simplify
from shardserve.export.tracing.trace import Trace

Placements = Mapping[str, Shard]
"""Name of a tensor of the model → how it is cut; what isn't in it is whole."""


@dataclass(frozen=True)
class Move:
    """A collective: an all-reduce, or an all-gather of what was `placement` for the node `taker` (None: an output)."""

    kind: str
    value: str
    placement: Placement
    nbytes: int
    taker: fx.Node | None


@dataclass
class Outcome:
    """What placements lead to. `makes`: values that are sharded; `wants`: whole ones of which a rank takes its part."""

    placements: Placements
    makes: dict[str, Shard] = field(default_factory=dict)
    wants: dict[tuple[str, Shard], None] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    region: set[fx.Node] = field(default_factory=set)
    flops: float = 0.0  # that each rank is spared

    @property
    def gathers(self) -> list[Move]:
        return [move for move in self.moves if move.kind == "all_gather"]


class _Recorder(Emitter):
    """An emitter that makes no nodes, and notes each change of a placement."""

    def __init__(self, traced: Trace, size: int, sizes: cost.Sizes, outcome: Outcome) -> None:
        super().__init__(size, 0, traced.printer)
        self.sizes, self.outcome = sizes, outcome
        self.current: fx.Node | None = None
        self._count = 0

    def unique(self, name: str) -> str:
        if self.current is not None and name.partition("_item")[0] == self.current.name:
            return name
        self._count += 1
        return f"{name}~{self._count}"

    def local_shape(self, shape: Sequence[Dim], placement: Placement) -> tuple[Dim, ...]:
        if isinstance(placement, Shard):
            self._check(shape, placement)
        return super().local_shape(shape, placement)

    def _check(self, shape: Sequence[Dim], placement: Shard) -> None:
        if not placement.divides(shape[placement.dim], self.size):
            raise self.unplaceable(shape, placement)

    def _move(self, value: Value, target: Replicate | Shard) -> Value:
        if isinstance(target, Shard):
            self._check(value.shape, target)
        if isinstance(value.placement, Replicate):
            assert isinstance(target, Shard)
            self.outcome.wants[value.name, target] = None
        else:
            kind = "all_reduce" if isinstance(value.placement, Partial) else "all_gather"
            whole = self.sizes(cost.nbytes(value.shape, value.dtype))
            nbytes = whole if kind == "all_reduce" else whole // self.size
            self.outcome.moves.append(Move(kind, value.name, value.placement, nbytes, self.current))
        return replace(value, name=f"{value.name}~{target}", placement=target)

    def _append(
        self,
        name: str,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shape: tuple[Dim, ...] | None,
        dtype: torch.dtype | None,
        beside: tuple[str, ...] = (),
    ) -> LocalNode:
        return LocalNode(self.unique(name), op, (), {}, shape, dtype, 0, False)


class Prober:
    """Tries placements on one traced model for `size` ranks, at the example's sizes."""

    def __init__(self, traced: Trace, size: int) -> None:
        self.traced, self.size = traced, size
        self.sizes = cost.Sizes.example(traced)
        self.order = {node: index for index, node in enumerate(traced.graph.nodes)}
        self.nodes = {node.name: node for node in traced.graph.nodes}
        self.placeholders: dict[str, list[fx.Node]] = {}
        self.tied = _tied(traced)
        for node, tensor in traced.bound.items():
            self.placeholders.setdefault(self.tied[tensor], []).append(node)
        self._outputs = {value for _, value in traced.outputs}
        self._whole = self._baseline()
        self._from_data = self._reached([node for _, node in traced.inputs])
        self.node_flops = {node: self.sizes(cost.node_flops(node)) for node in self.order if _is_call(node)}
        self._tried: dict[tuple[tuple[str, Shard], ...], Outcome | None] = {}

    def source(self, value: str) -> fx.Node | None:
        """The node that makes a value of `makes` or `wants`; None for one between two nodes."""
        return self.nodes.get(value) or self.nodes.get(value.rpartition("_item")[0])

    def sound(self, outcome: Outcome) -> bool:
        """Whether nothing is gathered that depends on parameters alone: they would better have stayed whole."""
        sources = (self.source(move.value.partition("~")[0]) for move in outcome.gathers)
        return all(source is None or source in self._from_data for source in sources)

    def _reached(self, pending: list[fx.Node]) -> set[fx.Node]:
        reached = set(pending)
        while pending:
            for user in pending.pop().users:
                if user not in reached:
                    reached.add(user)
                    pending.append(user)
        return reached

    def whole(self, node: fx.Node) -> Any:
        """What `node` gives when nothing is sharded."""
        return self._whole.get(node)

    def __call__(self, placements: Placements) -> Outcome | None:
        """What these placements lead to; None if they don't divide somewhere."""
        key = tuple(sorted(placements.items(), key=str))
        if key not in self._tried:
            try:
                self._tried[key] = self._run(dict(placements))
            except Unplaceable:
                self._tried[key] = None
        return self._tried[key]

    def _run(self, placements: Placements) -> Outcome:
        outcome = Outcome(placements)
        emitter = _Recorder(self.traced, self.size, self.sizes, outcome)
        changed: dict[fx.Node, Any] = {}
        pending: list[tuple[int, fx.Node]] = []
        queued: set[fx.Node] = set()

        def give(node: fx.Node, value: Any) -> None:
            changed[node] = value
            for user in node.users:
                if user not in queued and _is_call(user):
                    queued.add(user)
                    heapq.heappush(pending, (self.order[user], user))

        for tensor, placement in placements.items():
            for node in self.placeholders[tensor]:
                emitter.current = node
                value = self._whole[node]
                emitter.local_shape(value.shape, placement)
                outcome.makes[node.name] = placement
                give(node, replace(value, placement=placement))
        environment = ChainMap(changed, self._whole)
        while pending:
            node = heapq.heappop(pending)[1]
            emitter.current = node
            outcome.region.add(node)
            value = emit(emitter, node, environment)
            if any(not isinstance(item.placement, Replicate) for item in _values(value)):
                outcome.flops += self.node_flops.get(node, 0) * (1 - 1 / self.size)
            value = settled(emitter, node, value)
            values = list(_values(value))
            outcome.makes.update({x.name: x.placement for x in values if isinstance(x.placement, Shard)})
            if any(not isinstance(item.placement, Replicate) for item in values):
                give(node, value)
            elif values and values[0].name != node.name and isinstance(value, Value):
                changed[node] = value  # reduced already: users of it see that it was
        emitter.current = None
        for node in self._outputs:
            if node in changed and isinstance(changed[node], Value):
                emitter.replicated(changed[node])
        return outcome

    def _baseline(self) -> dict[fx.Node, Any]:
        whole: dict[fx.Node, Any] = dict(self.traced.constants)
        for node in self.order:
            if node in whole or node.op not in ("placeholder", "call_function"):
                continue
            meaning = node.meta.get("val")
            if isinstance(meaning, Tensor):
                whole[node] = _whole(node.name, meaning)
            elif isinstance(meaning, (list, tuple)):
                items = enumerate(meaning)
                whole[node] = [_whole(f"{node.name}_item{i}", item) for i, item in items if isinstance(item, Tensor)]
            elif isinstance(meaning, (int, torch.SymInt)) and not isinstance(meaning, bool):
                whole[node] = simplify(meaning)
            elif isinstance(meaning, (float, torch.SymFloat)):
                whole[node] = Scalar(node.name)
            else:
                whole[node] = None
        return whole


def _tied(traced: Trace) -> dict[str, str]:
    """Name of a tensor → the first name of the same memory: tied weights have one placement."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((cost.storage(tensor), tensor.shape), name) for name, tensor in traced.tensors.items()
    }


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _whole(name: str, fake: Tensor) -> Value:
    return Value(name, tuple(simplify(size) for size in fake.shape), fake.dtype, Replicate())


def _values(value: Any) -> Iterator[Value]:
    if isinstance(value, Value):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _values(item)
