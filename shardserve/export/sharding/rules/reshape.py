"""The rule of operators that give the same elements a new shape: where a sharded dim goes."""

from __future__ import annotations

from collections.abc import Sequence

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Shard
from shardserve.export.sharding.rules.table import rule
from shardserve.export.symbols import Dim, divide, product


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten")
def view(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """A new shape for the same elements; parts keep theirs where the sharded dim leads its group of merged dims.

    Always a reshape: strides of a rank's part may not allow the view that the whole tensor's allowed.
    """
    if call.op._overloadname == "dtype":
        return None
    x = call["self"] if "self" in call.arguments else call["input"]
    placement = x.placement
    if isinstance(placement, Shard):
        moved = _reshaped(x.shape, call.shape, placement, emitter.size)
        if moved is None:
            return None
        placement = moved
    shape = list(emitter.local_shape(call.shape, placement))
    return emitter.call("aten.reshape.default", (x, shape), {}, call.shape, call.dtype, placement, call.name)


def _reshaped(before: Sequence[Dim], after: Sequence[Dim], placement: Shard, size: int) -> Shard | None:
    """Where a sharded dim goes in a reshape, None where its parts don't stay together."""
    dim, blocks = placement.dim, placement.blocks
    if isinstance(blocks, tuple):
        return _reshaped_blocks(before, after, dim, blocks, size)
    if blocks != 1:  # [blocks * n], a part of each block, is [blocks, n] with n sharded
        part = divide(before[dim], blocks)
        assert part is not None
        before, dim = (*before[:dim], blocks, part, *before[dim + 1 :]), dim + 1
    # Look for the dim of the result that begins at the same number of elements as the sharded one, or before it: then
    # it takes in dims that were in front of the sharded one, and the part lies in as many blocks as those are long.
    head = product(before[:dim])
    for target in reversed(range(len(after))):
        outer = divide(head, product(after[:target]))
        inner = None if outer is None else divide(after[target], outer)
        if outer is not None and inner is not None and after[target] != 1 and divide(inner, size) is not None:
            return Shard(target, outer)
    return None


def _reshaped_blocks(
    before: Sequence[Dim], after: Sequence[Dim], dim: int, blocks: Sequence[int], ranks: int
) -> Shard | None:
    """The same for blocks of unequal sizes: only to a dim that begins with the same element, at as many of its own."""
    head, whole = product(before[:dim]), sum(blocks)
    for target, size in enumerate(after):
        if product(after[:target]) == head and size != 1:
            if not isinstance(size, int) or any(block * size % whole for block in blocks):
                return None
            moved = Shard(target, tuple(block * size // whole for block in blocks))
            return moved if moved.divides(size, ranks) else None
    return None
