"""Rules of operators that multiply matrices: linear layers, products, attention."""

from __future__ import annotations

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Blocks, Partial, Placement, Replicate, Shard
from shardserve.export.sharding.rules.table import aligned, is_whole, rule


@rule("linear")
def linear(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """x [..., k], weight [n, k], bias [n], or of size 1, → [..., n]."""
    x, weight, bias = emitter.reduced(call["input"]), call["weight"], call.get("bias")
    last = x.ndim - 1
    if weight.ndim != 2:
        return None
    if weight.placement == Replicate() and isinstance(x.placement, Shard):
        if x.placement.dim != last:
            return call.emit(emitter, x.placement, input=x, bias=bias and emitter.replicated(bias))
        # A slice of the weight costs nothing; gathering x would cost as much as the reduction.
        weight = emitter.redistribute(weight, Shard(1, x.placement.blocks))
    if not isinstance(weight.placement, Shard):
        return None
    if weight.placement.dim == 0:
        x, blocks = emitter.replicated(x), weight.placement.blocks
        bias = bias and aligned(emitter, bias, Shard(last, blocks), x.ndim)
        return call.emit(emitter, Shard(last, blocks), input=x, weight=weight, bias=bias)
    x = emitter.redistribute(x, Shard(last, weight.placement.blocks))
    bias, beside = one_rank_only(emitter, bias)
    return call.emit(emitter, Partial(), beside, input=x, weight=weight, bias=bias)


def one_rank_only(emitter: Emitter, bias: Value | None) -> tuple[Value | None, list[Value]]:
    """The bias of a sum over ranks, added by the first, and what stands beside the others' calls: they make it too."""
    if bias is None:
        return None, []
    bias = emitter.replicated(bias)
    return (bias, []) if emitter.coordinate == 0 else (None, [bias])


@rule("matmul", "mm", "bmm")
def matmul(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """left [..., m, k] @ right [..., k, n]."""
    first, second = list(call.values)
    left, right = (emitter.reduced(call[name]) for name in (first, second))
    if left.ndim < 2 or right.ndim < 2:
        return None
    m, k, n = left.ndim - 2, left.ndim - 1, right.ndim - 1
    ndim = len(call.shape)

    def emitted(placement: Placement, left: Value, right: Value) -> Value | list[Value]:
        return call.emit(emitter, placement, **{first: left, second: right})

    if isinstance(left.placement, Shard) and left.placement.dim == m and is_whole(right):
        return emitted(Shard(ndim - 2, left.placement.blocks), left, right)
    contracted = _contraction(left, k, right, n - 1)
    if contracted is not None:
        left, right = (emitter.redistribute(side, Shard(dim, contracted)) for side, dim in ((left, k), (right, n - 1)))
        return emitted(Partial(), left, right)
    if isinstance(right.placement, Shard) and right.placement.dim == n:
        return emitted(Shard(ndim - 1, right.placement.blocks), emitter.replicated(left), right)
    for side in (left, right):
        if isinstance(side.placement, Shard) and side.placement.dim < side.ndim - 2:
            batch = Shard(side.placement.dim + ndim - side.ndim, side.placement.blocks)
            return emitted(batch, *(aligned(emitter, value, batch, ndim) for value in (left, right)))
    return None


def _contraction(left: Value, left_dim: int, right: Value, right_dim: int) -> Blocks | None:
    """The blocks in which the contracted dim is sharded on either side, None where it isn't."""
    for side, dim in ((right, right_dim), (left, left_dim)):
        if isinstance(side.placement, Shard) and side.placement.dim == dim:
            return side.placement.blocks
    return None


@rule("baddbmm")
def baddbmm(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """self + left [b, m, k] @ right [b, k, n], as attention scores with a mask are: by the batch dim."""
    call = call.mapped(emitter.reduced)
    sides = [call["batch1"], call["batch2"]]
    batch = next((side.placement for side in sides if side.placement != Replicate()), None)
    if not isinstance(batch, Shard) or batch.dim != 0:
        return None
    return call.mapped(lambda value: aligned(emitter, value, batch, 3)).emit(emitter, batch)


@rule("einsum")
def einsum(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """Along one sharded letter: kept, it shards the result; contracted, it leaves terms of a sum."""
    equation = str(call["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    left, result = equation.split("->")
    call = call.mapped(emitter.reduced)
    operands = list(zip(left.split(","), call["tensors"], strict=True))
    sharded = [(letters[x.placement.dim], x.placement) for letters, x in operands if isinstance(x.placement, Shard)]
    if not sharded or any(letters.count(letter) > 1 for letters, _ in operands for letter in letters):
        return None
    letter, blocks = sharded[0][0], sharded[0][1].blocks
    placement = Shard(result.index(letter), blocks) if letter in result else Partial()

    def own(letters: str, x: Value) -> Value:
        dim = letters.find(letter)
        broadcast = dim < 0 or x.shape[dim] == 1
        return emitter.replicated(x) if broadcast else emitter.redistribute(x, Shard(dim, blocks))

    tensors = [own(letters, x) for letters, x in operands]
    return call.emit(emitter, placement, tensors=tensors)


@rule("addmm")
def addmm(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """bias + left [m, k] @ right [k, n]; only what a linear layer is."""
    bias, left, right = call["self"], emitter.reduced(call["mat1"]), call["mat2"]
    if call["beta"] != 1 or call["alpha"] != 1 or bias.ndim != 1 or not isinstance(right.placement, Shard):
        return None
    blocks = right.placement.blocks
    if right.placement.dim == 1:
        bias = aligned(emitter, bias, Shard(1, blocks), 2)
        return call.emit(emitter, Shard(1, blocks), self=bias, mat1=emitter.replicated(left))
    left = emitter.redistribute(left, Shard(1, blocks))
    own, beside = one_rank_only(emitter, bias)
    if own is not None:
        return call.emit(emitter, Partial(), self=own, mat1=left)
    return emitter.call("aten.mm.default", (left, right), {}, call.shape, call.dtype, Partial(), call.name, beside)


@rule("scaled_dot_product_attention")
def attention(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """query [..., heads, t, d], key, value [..., heads, s, d], mask broadcast to [..., heads, t, s]: by head or batch.

    Kept whole, so that each device's own fast kernel is chosen when it runs.
    """
    query, key, value = (emitter.reduced(call[name]) for name in ("query", "key", "value"))
    placement = query.placement
    if not isinstance(placement, Shard) or placement.dim >= query.ndim - 2:
        return None
    if key.ndim != query.ndim or value.ndim != query.ndim:
        return None
    if not all(placement.divides(side.shape[placement.dim], emitter.size) for side in (key, value)):
        if not call["enable_gqa"] or placement != Shard(query.ndim - 3):
            return None
        own = [_own_head(emitter, side, placement.dim) for side in (key, value)]
        if own[0] is None or own[1] is None:
            return None
        key, value = own[0], own[1]
    else:
        key, value = (emitter.redistribute(side, placement) for side in (key, value))
    mask = call.get("attn_mask")
    if mask is not None:
        mask = aligned(emitter, emitter.reduced(mask), placement, query.ndim)
    return call.emit(emitter, placement, query=query, key=key, value=value, attn_mask=mask)


def _own_head(emitter: Emitter, side: Value, dim: int) -> Value | None:
    """The one head of keys or values, of fewer heads than ranks, that this rank's heads of queries share."""
    heads = side.shape[dim]
    if not isinstance(heads, int) or emitter.size % heads:
        return None
    first = emitter.coordinate * heads // emitter.size
    side, shape = emitter.replicated(side), (*side.shape[:dim], 1, *side.shape[dim + 1 :])
    return emitter.call("aten.slice.Tensor", (side, dim, first, first + 1), {}, shape, side.dtype, Replicate())
