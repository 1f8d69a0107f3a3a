"""What each operator does with sharded tensors: a table of small functions.

A rule emits the operator on this rank's parts and says how the result lies; it returns None where it has no better way
than the whole tensors. Operators without a rule take whole tensors too: always right, and the report names those that
had to be gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from shardserve.export.sharding.emit import Call, Emitter, Rule, Scalar, Value
from shardserve.export.sharding.placements import Blocks, Partial, Placement, Replicate, Shard
from shardserve.export.symbols import Dim, divide, product

RULES: dict[str, Rule] = {}
"""Operator name → rule; what is tagged pointwise and isn't here follows `pointwise`."""

_ELEMENTWISE = frozenset(
    {"__and__", "__or__", "__xor__", "_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh_copy", "where"}
)
_NOT_ELEMENTWISE = frozenset({"prelu"})  # its weight lies along dim 1, whatever the input's rank
_KEEPS_SUM = frozenset({"neg", "alias", "clone", "contiguous", "detach"})


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def emit(emitter: Emitter, call: Call) -> Value | list[Value]:
    """Append one operator of the model to the rank's graph."""
    chosen = _rule(call)
    if chosen is not None:
        result = chosen(emitter, call)
        if result is not None:
            return result
    if any(isinstance(value.placement, Shard) for value in call.values.values()):
        emitter.gathered[call.opname] = emitter.gathered.get(call.opname, 0) + 1
    return call.mapped(emitter.replicated).emit(emitter, Replicate())


def _rule(call: Call) -> Rule | None:
    chosen = RULES.get(call.opname)
    elementwise = torch.Tag.pointwise in call.op.tags or call.opname in _ELEMENTWISE
    if chosen is None and elementwise and call.opname not in _NOT_ELEMENTWISE and not call.several:
        return pointwise
    return chosen


def pointwise(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """Elementwise with broadcasting: along one sharded dim of the result, every operand that has it is sharded."""
    kept = _pending_sum(call)
    if kept is not None:
        return call.emit(emitter, kept)
    added = _added_once(emitter, call)
    if added is not None:
        return added
    call = call.mapped(emitter.reduced)
    sharded = next(
        (
            Shard(value.placement.dim + len(call.shape) - value.ndim, value.placement.blocks)
            for value in call.values.values()
            if isinstance(value.placement, Shard)
        ),
        None,
    )
    if sharded is None:
        return call.emit(emitter, Replicate())
    if _residual(emitter, call):
        return call.mapped(emitter.replicated).emit(emitter, Replicate())
    return call.mapped(lambda value: _aligned(emitter, value, sharded, len(call.shape))).emit(emitter, sharded)


@rule("type_as")
def type_as(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """Of `other` only the dtype is taken, which the graph says: it may lie anyhow."""
    x = call["self"]
    if x.placement != Partial() or not _as_precise(call.dtype, x.dtype):
        x = emitter.reduced(x)
    return emitter.call("aten.to.dtype", (x, call.dtype), {}, call.shape, call.dtype, x.placement, call.name)


def _as_precise(dtype: torch.dtype, before: torch.dtype) -> bool:
    """Whether terms of a sum may be converted before they are added. Not integers: their sum wraps."""
    return dtype == before or (before.is_floating_point and torch.promote_types(before, dtype) == dtype)


def _pending_sum(call: Call) -> Partial | None:
    """The placement of a result that is linear in operands whose sum over the ranks is still to be taken."""
    pending = [value for value in call.values.values() if isinstance(value.placement, Partial)]
    if not pending or any(value.placement != Partial() for value in pending):
        return None
    if not all(_as_precise(call.dtype, value.dtype) for value in pending):
        return None
    linear = call.opname in _KEEPS_SUM or call.opname == "_to_copy"
    if call.opname in ("add", "sub"):
        linear = len(pending) == 2
    if call.opname == "mul":
        factors = [call["self"], call["other"]]
        linear = len(pending) == 1 and all(x in pending or _whole_or_ordinary(x) for x in factors)
    if call.opname == "div":
        linear = call.get("rounding_mode") is None and _is_ordinary(call["other"])
    return Partial() if linear else None


def _whole_or_ordinary(factor: Any) -> bool:
    return _whole(factor) if isinstance(factor, Value) else isinstance(factor, Scalar) or _is_ordinary(factor)


def _is_ordinary(number: Any) -> bool:
    """Whether no term of a sum, times or by it, is infinite where the sum isn't: of terms +inf and -inf would come NaN.
    A size is, where it can't be 0.
    """
    if isinstance(number, sympy.Basic):
        return bool(number.is_positive)
    tiny = torch.finfo(torch.float32).tiny
    return isinstance(number, (int, float)) and tiny <= abs(number) <= 1 / tiny


def _residual(emitter: Emitter, call: Call) -> bool:
    """Whether something whole is added to what had to be gathered before: sharded, the result would be gathered too."""
    if call.opname != "add":
        return False
    whole = [value for value in call.values.values() if _whole(value) and value.shape == call.shape]
    sharded = [value for value in call.values.values() if isinstance(value.placement, Shard)]
    return bool(whole) and all(map(emitter.was_gathered, sharded))


def _added_once(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """A whole operand added to a pending sum: by one rank, so that the sum may go on pending and take in more terms."""
    if call.opname != "add" or call.shared or call.get("alpha") != 1:
        return None
    sides = [call["self"], call["other"]]
    term = next((side for side in sides if isinstance(side, Value) and side.placement == Partial()), None)
    other = sides[0] if term is sides[1] else sides[1]
    if term is None or not isinstance(other, Value) or not _whole(other):
        return None
    if term.shape != call.shape or term.dtype != call.dtype:
        return None
    if emitter.coordinate == 0:
        return call.emit(emitter, Partial())
    return emitter.call("aten.alias.default", (term,), {}, call.shape, call.dtype, Partial(), call.name, [other])


def _whole(value: Value) -> bool:
    return isinstance(value.placement, Replicate)


def _aligned(emitter: Emitter, value: Value, result: Shard, ndim: int) -> Value:
    """`value` as an operand of a result sharded so: sharded alike, or whole where it is broadcast along that dim."""
    dim = result.dim - (ndim - value.ndim)
    if dim < 0 or value.shape[dim] == 1:
        return emitter.replicated(value)
    return emitter.redistribute(value, Shard(dim, result.blocks))


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
        bias = bias and _aligned(emitter, bias, Shard(last, blocks), x.ndim)
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

    if isinstance(left.placement, Shard) and left.placement.dim == m and _whole(right):
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
            return emitted(batch, *(_aligned(emitter, value, batch, ndim) for value in (left, right)))
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
    return call.mapped(lambda value: _aligned(emitter, value, batch, 3)).emit(emitter, batch)


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
        bias = _aligned(emitter, bias, Shard(1, blocks), 2)
        return call.emit(emitter, Shard(1, blocks), self=bias, mat1=emitter.replicated(left))
    left = emitter.redistribute(left, Shard(1, blocks))
    own, beside = one_rank_only(emitter, bias)
    if own is not None:
        return call.emit(emitter, Partial(), self=own, mat1=left)
    return emitter.call("aten.mm.default", (left, right), {}, call.shape, call.dtype, Partial(), call.name, beside)


@rule("embedding")
def embedding(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """weight [rows, width], ids → [*ids, width]; our own kernel, which checks the ids' range on every rank alike."""
    weight, ids = emitter.reduced(call["weight"]), emitter.replicated(call["indices"])
    rows, start = weight.shape[0], 0
    placement: Placement = Replicate()
    if isinstance(weight.placement, Shard) and weight.placement.blocks != 1:
        weight = emitter.replicated(weight)
    if isinstance(weight.placement, Shard):
        if weight.placement.dim == 0:
            part = divide(rows, emitter.size)
            assert isinstance(part, int)
            placement, start = Partial(), part * emitter.coordinate
        else:
            placement = Shard(len(call.shape) - 1)
    return emitter.call(
        "shardserve.embedding", (weight, ids, start, rows), {}, call.shape, call.dtype, placement, call.name
    )


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def normalization(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """Normalizes over the last dims: parts of any dim before them stand alone."""
    x = emitter.reduced(call["input"])
    if not isinstance(x.placement, Shard) or x.placement.dim >= x.ndim - len(call["normalized_shape"]):
        return None
    changed: dict[str, Any] = {
        name: emitter.replicated(value) for name, value in call.values.items() if name != "input"
    }
    return call.emit(emitter, x.placement, input=x, **changed)


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
        mask = _aligned(emitter, emitter.reduced(mask), placement, query.ndim)
    return call.emit(emitter, placement, query=query, key=key, value=value, attn_mask=mask)


def _own_head(emitter: Emitter, side: Value, dim: int) -> Value | None:
    """The one head of keys or values, of fewer heads than ranks, that this rank's heads of queries share."""
    heads = side.shape[dim]
    if not isinstance(heads, int) or emitter.size % heads:
        return None
    first = emitter.coordinate * heads // emitter.size
    side, shape = emitter.replicated(side), (*side.shape[:dim], 1, *side.shape[dim + 1 :])
    return emitter.call("aten.slice.Tensor", (side, dim, first, first + 1), {}, shape, side.dtype, Replicate())


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
