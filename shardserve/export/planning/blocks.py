"""In which blocks a sharded value is taken apart by an operator that couldn't take its parts: a fused projection's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import fx

from shardserve.export.planning.probe import Move, Outcome, Prober
from shardserve.export.sharding.emit import Value
from shardserve.export.sharding.placements import Shard
from shardserve.export.symbols import Dim, divide, product

VIEWS = frozenset({"view", "_unsafe_view", "reshape", "unflatten"})


def taken_apart(outcome: Outcome, size: int, probe: Prober) -> Iterator[int | tuple[int, ...]]:
    """The blocks that what gathers the gathered values may mean: how many equal ones, or the size of each, of the
    parameter's dim of `size` that was cut.
    """
    for move in outcome.gathers:
        source = probe.source(move.value)
        if move.taker is None or source is None or not isinstance(move.placement, Shard):
            continue
        value = _value(source, move.value, probe)
        if value is not None:
            yield from (count for count in _parts(move.taker, value, move, probe) if count > 1)
            yield from _unequal(source, move.taker, value, move.placement.dim, size, probe)


def _value(node: fx.Node, name: str, probe: Prober) -> Value | None:
    whole = probe.whole(node)
    items = whole if isinstance(whole, list) else [whole]
    return next((item for item in items if isinstance(item, Value) and item.name == name), None)


def _parts(node: fx.Node, value: Value, move: Move, probe: Prober) -> list[int]:
    """The blocks of the sharded dim that `node`, which couldn't take the parts, may mean."""
    assert isinstance(move.placement, Shard)
    dim = move.placement.dim
    size = value.shape[dim]
    name = _name(node)
    result = probe.whole(node)
    if not isinstance(size, int):
        return []
    if isinstance(result, list):
        parts = {item.shape[dim] for item in result if item.ndim == value.ndim}
        if len(parts) == 1 and name != "unbind":
            return [len(result)]
        return [len(result)] if name == "unbind" and len(result) == size else []
    if not isinstance(result, Value):
        return []
    if name in ("slice", "narrow", "glu") and result.ndim == value.ndim:
        part = divide(size, result.shape[dim]) if result.shape[dim] != 0 else None
        return [part] if isinstance(part, int) else []
    if name == "select" and result.ndim == value.ndim - 1:
        return [size]
    if name in VIEWS:
        return _leading(value.shape, result.shape, dim)
    return []


def _unequal(
    source: fx.Node, taker: fx.Node, value: Value, dim: int, size: int, probe: Prober
) -> Iterator[tuple[int, ...]]:
    """The sizes, `size` together, of what `taker` splits `value` into, or of what it and others take as slices."""
    whole = value.shape[dim]
    if not isinstance(whole, int):
        return
    ends = {0, whole}
    for node in source.users if _name(taker) == "slice" else [taker]:
        ends.update(_split(node, value, dim, probe) or _slice(node, value, dim, probe))
    if len(ends) > 2 and all(end * size % whole == 0 for end in ends):
        yield tuple(stop - start for start, stop in pairwise(end * size // whole for end in sorted(ends)))


def _split(node: fx.Node, value: Value, dim: int, probe: Prober) -> list[int]:
    """Where the parts end that a split makes of this dim."""
    parts = probe.whole(node)
    if _name(node) not in ("split", "split_with_sizes", "chunk") or not isinstance(parts, list):
        return []
    sizes = [size for part in parts if isinstance(size := part.shape[dim], int)]
    return list(accumulate(sizes)) if len(sizes) == len(parts) and sum(sizes) == value.shape[dim] else []


def _slice(node: fx.Node, value: Value, dim: int, probe: Prober) -> list[int]:
    """Where a slice of this dim begins and ends."""
    part = probe.whole(node)
    if _name(node) != "slice" or not isinstance(part, Value):
        return []
    along = node.args[1] if len(node.args) > 1 else 0
    start = (node.args[2] if len(node.args) > 2 else None) or 0
    whole, length = value.shape[dim], part.shape[dim]
    if not (isinstance(along, int) and isinstance(start, int) and isinstance(whole, int) and isinstance(length, int)):
        return []
    first = max(start + whole, 0) if start < 0 else start
    return [first, first + length] if along % value.ndim == dim else []


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "")


def _leading(before: Sequence[Dim], after: Sequence[Dim], dim: int) -> list[int]:
    """Of a dim that is viewed as several: the sizes of the first, of the first two together, …"""
    head, found = product(before[:dim]), list[int]()
    for index in range(len(after)):
        if product(after[:index]) == head:
            blocks = 1
            for size in after[index:]:
                if not isinstance(size, int) or blocks * size >= before[dim]:
                    break
                blocks *= size
                if blocks > 1:
                    found.append(blocks)
            break
    return found
