"""Where to cut a model into pipeline stages of about equal cost, across few bytes.

A stage's load is the seconds of its operators by the cost model, at the example's sizes, plus its parameters' bytes at
the memory's bandwidth (tables in full: they take the memory, if not the time) and what it sends. A cut may be wherever
a module begins, at any depth. Of the partitions whose largest load is within `SLACK` of the smallest possible, the one
is taken that sends the fewest bytes and holds the fewest twice, then names the outermost modules, then has the most
even loads. Where that one holds weights in several stages (a cut in a loop, tied weights), balance is given up for
fewer of them, see `_partition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from shardserve.errors import ExportError
from shardserve.export import cost
from shardserve.export.sharding import cut
from shardserve.export.sharding.state import changing
from shardserve.export.symbols import simplify
from shardserve.export.tracing.trace import Trace
from shardserve.shards.config import DTYPES

SLACK = 1.1
LOOSER = SLACK, 1.2, 1.3, 1.4, 1.5
"""The largest load, over the smallest possible, that may be taken for fewer bytes of weights in several stages."""
_Rank: TypeAlias = tuple[int, int, float]
"""Bytes sent and weights' bytes held, depth of the modules' names, sum of the loads' squares: less is better, in this
order.
"""


@dataclass
class _Piece:
    """What is between two places where a cut may be. `needs`: parameters, and what doesn't depend on the inputs' values
    and so is computed in each stage that needs it, with their seconds; `weights`: the bytes of the former. `sent`: the
    bytes that would cross before it.
    """

    module: str
    sent: int
    seconds: float = 0.0
    needs: dict[Any, float] = field(default_factory=dict)
    weights: dict[Any, int] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return self.module.count(".")


def balance(traced: Trace, count: int) -> tuple[str, ...]:
    """The modules at which to cut into `count` stages. ExportError if there are too few places for a cut."""
    pieces, refused = _Pieces(traced).found()
    if len(pieces) < count:
        reasons = f" ({refused[0]})" if refused else ""
        places = f"{len(pieces) - 1 or 'no'} module{'s' * (len(pieces) != 2)} to cut at{reasons}"
        raise ExportError(f"the model has {places}; {count} stages need {count - 1}: take at most {len(pieces)}")
    chosen = _partition(pieces, count)
    return tuple(pieces[index].module for index in chosen)


class _Pieces:
    """Reads the traced graph: what depends on the inputs' values, in order, and what is alive between."""

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.sizes = cost.Sizes.example(traced)
        self.changing = changing(traced)
        self.from_data = dict.fromkeys((*(node for _, node in traced.inputs), *self.changing), True)
        live = _live([*(value for _, value in traced.outputs), *traced.updates.values()])
        self.order: list[fx.Node] = []
        # Name of the module → the index in `order` at which it begins.
        self.begins: dict[str, int] = {}
        for node in traced.graph.nodes:
            if node.op != "call_function" or node not in live:
                continue
            is_data = _has_tensors(node) and any(self.from_data.get(source) for source in node.all_input_nodes)
            self.from_data[node] = is_data
            for name in cut.modules(node):
                self.begins.setdefault(name, len(self.order))
            if is_data:
                self.order.append(node)
        self._needs: dict[fx.Node, dict[Any, float]] = {}
        self._bytes_of: dict[Any, int] = {}

    def found(self) -> tuple[list[_Piece], list[str]]:
        """The pieces in order, and why there is no cut where it can't be."""
        crossing, refused = self._crossing()
        places: dict[int, str] = {}
        for name, index in self.begins.items():
            if 0 < index < len(self.order) and (index not in places or name.count(".") < places[index].count(".")):
                places[index] = name
        pieces = [_Piece("", 0)]
        for index, node in enumerate(self.order):
            if index in places and crossing[index] is not None:
                pieces.append(_Piece(places[index], crossing[index] or 0))
            pieces[-1].seconds += self._seconds(node, self.traced.bound)
            for source in node.all_input_nodes:
                if not self.from_data.get(source):
                    pieces[-1].needs.update(self._closure(source))
        for piece in pieces:
            piece.weights = {key: self._bytes_of[key] for key in piece.needs if key in self._bytes_of}
        return pieces, [refused[index] for index in sorted(places) if index in refused]

    def _crossing(self) -> tuple[list[int | None], dict[int, str]]:
        """For each index of `order` the bytes that are alive before it; None, and why, where something can't cross."""
        index_of = {node: -1 for _, node in self.traced.inputs}
        index_of.update({node: index for index, node in enumerate(self.order)})
        for node in self.order:
            if _several(node.all_input_nodes) is not None:  # one result of several is there as soon as the others
                index_of[node] = index_of[node.all_input_nodes[0]]
        # A buffer that the model changes is where it is written; later stages get it from there.
        index_of.update({buffer: index_of.get(update, -1) for buffer, update in self.changing.items()})
        last: dict[fx.Node, int] = {}
        for index, node in enumerate(self.order):
            for source in node.all_input_nodes:
                if source in index_of:
                    last[source] = index
        for _, value in self.traced.outputs:
            last[value] = len(self.order)
        alive: list[int | None] = [0] * (len(self.order) + 1)
        refused: dict[int, str] = {}
        for node, end in last.items():
            size, reason = self._bytes(node)
            for index in range(index_of.get(node, end) + 1, min(end, len(self.order) - 1) + 1):
                held = alive[index]
                alive[index] = None if reason or held is None else held + size
                if reason:
                    refused.setdefault(index, reason)
        for buffer, update in self.changing.items():
            reason = f"the buffer '{self.traced.bound[buffer]}' is used before it and changed after it"
            first = min((index for index, node in enumerate(self.order) if buffer in node.all_input_nodes), default=0)
            for index in range(first + 1, index_of.get(update, -1) + 1):
                alive[index] = None
                refused.setdefault(index, reason)
        return alive, refused

    def _bytes(self, node: fx.Node) -> tuple[int, str]:
        """The bytes of a value at the example's sizes, and why it can't cross a cut, if so."""
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return 0, ""  # each of several results crosses for itself
        shape = tuple(simplify(size) for size in value.shape)
        try:
            self.traced.printer.shape(shape)
        except ExportError as error:
            return 0, f"'{node.name}' can't cross a cut: {error}"
        if value.dtype not in _CROSSING:
            return 0, f"'{node.name}' can't cross a cut: it is {str(value.dtype).removeprefix('torch.')}"
        return self.sizes(cost.nbytes(shape, value.dtype)), ""

    def _seconds(self, node: fx.Node, without: Mapping[fx.Node, str]) -> float:
        operation = cost.traced_operation(node, without)
        nbytes = self.sizes(operation.bytes)
        return cost.CPU.compute_seconds(self.sizes(operation.flops), nbytes) if nbytes else 0.0

    def _closure(self, node: fx.Node) -> dict[Any, float]:
        """What a value that doesn't depend on the inputs' values is made of: what it takes, and its seconds."""
        if node not in self._needs:
            found: dict[Any, float] = {}
            tensor = self.traced.bound.get(node)
            if tensor is not None:
                whole = self.traced.tensors[tensor]
                key = cost.storage(whole)
                self._bytes_of[key] = whole.nbytes
                found[key] = whole.nbytes / cost.CPU.bytes_per_second
            elif node.op == "call_function" and _has_tensors(node):
                for source in node.all_input_nodes:
                    if not self.from_data.get(source):
                        found.update(self._closure(source))
                found[node] = self._seconds(node, self.traced.bound)
            self._needs[node] = found
        return self._needs[node]


_CROSSING = frozenset(getattr(torch, name) for name in DTYPES)


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return any(isinstance(item, Tensor) for item in (value if isinstance(value, (list, tuple)) else (value,)))


def _several(sources: Sequence[fx.Node]) -> fx.Node | None:
    """The operator with several results that a getitem takes one of."""
    return sources[0] if len(sources) == 1 and isinstance(sources[0].meta.get("val"), (list, tuple)) else None


def _live(pending: list[Any]) -> set[fx.Node]:
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return live


def _loads(pieces: Sequence[_Piece]) -> npt.NDArray[np.float64]:
    """[i, j]: of the stage of pieces i to j, j not included; infinite where j isn't after i."""
    loads = np.full((len(pieces), len(pieces) + 1), np.inf)
    # The fixed time of a transfer is that of any cut, and passes beside the computation.
    sent = np.array([*(piece.sent for piece in pieces[1:]), 0]) / cost.CPU.link_bytes_per_second
    for begin in range(len(pieces)):
        needed: set[Any] = set()
        added: list[float] = []
        for piece in pieces[begin:]:
            new = [key for key in piece.needs if key not in needed]  # not a set: its order changes the sum
            added.append(piece.seconds + sum(piece.needs[key] for key in new))
            needed.update(new)
        loads[begin, begin + 1 :] = np.cumsum(added) + sent[begin:]
    return loads


def _held(pieces: Sequence[_Piece]) -> npt.NDArray[np.int64]:
    """[i, j]: the bytes of the weights of the stage of pieces i to j, j not included."""
    held = np.zeros((len(pieces), len(pieces) + 1), np.int64)
    for begin in range(len(pieces)):
        weights: dict[Any, int] = {}
        total = 0
        for end, piece in enumerate(pieces[begin:], begin + 1):
            total += sum(size for key, size in piece.weights.items() if key not in weights)
            weights.update(piece.weights)
            held[begin, end] = total
    return held


def _partition(pieces: Sequence[_Piece], count: int) -> list[int]:
    """The pieces that begin the stages after the first.

    Of partitions with larger and larger loads, as `LOOSER` has them, that of the smallest product of this and the
    square of the weights' bytes in all stages: who cuts a model into stages wants less of it in each.
    """
    loads, held = _loads(pieces), _held(pieces)
    whole = int(held[0, -1])
    best: tuple[float, list[int]] | None = None
    for slack in LOOSER:
        begins = _within(slack, pieces, count, loads, held)
        stages = pairwise((0, *begins, len(pieces)))
        total = sum(int(held[begin, end]) for begin, end in stages)
        price = slack * (total / whole if whole else 1.0) ** 2
        if best is None or price < best[0]:
            best = price, begins
        if total <= whole:
            break
    assert best is not None
    return best[1]


def _within(
    slack: float,
    pieces: Sequence[_Piece],
    count: int,
    loads: npt.NDArray[np.float64],
    held: npt.NDArray[np.int64],
) -> list[int]:
    """The best partition whose largest load is at most `slack` times the smallest possible."""
    size = len(pieces)
    # rest[k][i]: the smallest largest load of k stages that hold the pieces from i on.
    rest = [np.array([np.inf] * size + [0.0])]
    for _ in range(count):
        rest.append(np.append(np.maximum(loads, rest[-1]).min(axis=1), np.inf))
    limit = float(rest[count][0]) * slack
    best: dict[int, tuple[_Rank, tuple[int, ...]]] = {0: ((0, 0, 0.0), ())}
    for left in reversed(range(count)):
        reached: dict[int, tuple[_Rank, tuple[int, ...]]] = {}
        for i, ((moved, depth, squares), cuts) in best.items():
            for j in map(int, np.flatnonzero((loads[i] <= limit) & (rest[left] <= limit))):
                load = float(loads[i, j])
                squared = squares + load * load
                piece = pieces[j] if j < size else None
                sent, deeper = (piece.sent, piece.depth) if piece else (0, 0)
                rank = moved + sent + int(held[i, j]), depth + deeper, squared
                if j not in reached or rank < reached[j][0]:
                    reached[j] = (rank, (*cuts, j))
        best = reached
    return list(best[size][1][:-1])
