"""Rules of operators that move, cut, join or reduce dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Partial, Placement, Replicate, Shard
from shardserve.export.sharding.rules.table import pointwise, rule
from shardserve.export.symbols import divide

Result = Value | list[Value] | None


def _moved(emitter: Emitter, call: Call, order: Sequence[int]) -> Result:
    """A permutation: dim i of the result is dim order[i] of the input."""
    placement = call["self"].placement
    if isinstance(placement, Shard):
        placement = Shard(list(order).index(placement.dim), placement.blocks)
    return call.emit(emitter, placement)


def _positive(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


@rule("transpose", "swapaxes")
def transpose(emitter: Emitter, call: Call) -> Result:
    ndim = call["self"].ndim
    order = list(range(ndim))
    first, second = (_positive(call[name], ndim) for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return _moved(emitter, call, order)


@rule("t")
def t(emitter: Emitter, call: Call) -> Result:
    return _moved(emitter, call, range(call["self"].ndim)[::-1])


@rule("permute")
def permute(emitter: Emitter, call: Call) -> Result:
    ndim = call["self"].ndim
    return _moved(emitter, call, [_positive(dim, ndim) for dim in call["dims"]])


@rule("unsqueeze")
def unsqueeze(emitter: Emitter, call: Call) -> Result:
    placement = call["self"].placement
    if isinstance(placement, Shard):
        new = _positive(call["dim"], len(call.shape))
        placement = Shard(placement.dim + (placement.dim >= new), placement.blocks)
    return call.emit(emitter, placement)


@rule("squeeze")
def squeeze(emitter: Emitter, call: Call) -> Result:
    """Only what has size 1 in the whole model goes, at every size: a rank's part of a sharded dim may have size 1, and
    so may a dynamic dim, which the trace took for a larger one.
    """
    x, placement = call["self"], call["self"].placement
    given = call.get("dim")
    dims = range(x.ndim) if given is None else [given] if isinstance(given, int) else given
    gone = sorted({_positive(dim, x.ndim) for dim in dims if x.ndim and x.shape[dim] == 1})
    if isinstance(placement, Shard):
        placement = Shard(placement.dim - sum(1 for dim in gone if dim < placement.dim), placement.blocks)
    op, args = ("aten.squeeze.dims", (x, gone)) if gone else ("aten.alias.default", (x,))
    return emitter.call(op, args, {}, call.shape, call.dtype, placement, call.name)


@rule("expand", "broadcast_to")
def expand(emitter: Emitter, call: Call) -> Result:
    """The sharded dim isn't one that is expanded: those have size 1."""
    placement = call["self"].placement
    if isinstance(placement, Shard):
        placement = Shard(placement.dim + len(call.shape) - call["self"].ndim, placement.blocks)
    sizes = list(emitter.local_shape(call.shape, placement))
    return call.emit(emitter, placement, size=sizes)


@rule("select", "unbind", "softmax", "_softmax", "log_softmax", "_log_softmax")
@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk", "argsort")
def along_dim(emitter: Emitter, call: Call) -> Result:
    """Works along one dim: parts of another stand alone."""
    x = emitter.reduced(call["self"])
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    dim = _positive(call["dim"], x.ndim)
    if dim == placement.dim:
        return None
    gone = call.opname in ("select", "unbind") and dim < placement.dim
    return call.emit(emitter, Shard(placement.dim - gone, placement.blocks), self=x)


def _along(emitter: Emitter, call: Call, along: Callable[[Value, Shard], Result]) -> Result:
    """Works along one dim: parts of another stand alone; `along` gives what becomes of those of the dim itself."""
    x = emitter.reduced(call["self"])
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    if _positive(call["dim"], x.ndim) != placement.dim:
        return call.emit(emitter, placement, self=x)
    return along(x, placement)


@rule("slice", "narrow")
def part_of_dim(emitter: Emitter, call: Call) -> Result:
    """Of the sharded dim, whole blocks are as many parts."""

    def along(x: Value, placement: Shard) -> Result:
        size, kept = x.shape[placement.dim], call.shape[placement.dim]
        start = call.get("start") or 0
        if not (isinstance(size, int) and isinstance(kept, int) and isinstance(start, int)):
            return None
        first = max(start + size, 0) if start < 0 else start
        placed = placement.within(size, first, first + kept)
        if placed is None or call.get("step") not in (None, 1):
            return None
        ends = (x, placement.dim, first // emitter.size, (first + kept) // emitter.size)
        return emitter.call("aten.slice.Tensor", ends, {}, call.shape, call.dtype, placed, call.name)

    return _along(emitter, call, along)


@rule("glu")
def glu(emitter: Emitter, call: Call) -> Result:
    """One half of a dim by the other: along the sharded one, where the halves are its two blocks."""

    def along(x: Value, placement: Shard) -> Result:
        return call.emit(emitter, Shard(placement.dim), self=x) if placement.blocks == 2 else None

    return _along(emitter, call, along)


@rule("split", "split_with_sizes", "chunk")
def split(emitter: Emitter, call: Call) -> Result:
    """Cut along a dim: along the sharded one only between its blocks."""

    def along(x: Value, placement: Shard) -> Result:
        dim = placement.dim
        sizes = [shape[dim] for shape, _ in call.results]
        placed: list[Shard | None] = [Shard(dim)] * len(sizes)
        if placement.blocks != len(sizes) or len(set(sizes)) > 1:
            if not all(isinstance(size, int) for size in (x.shape[dim], *sizes)):
                return None
            ends = [0, *accumulate(sizes)]
            placed = [placement.within(x.shape[dim], *between) for between in pairwise(ends)]
        known = [placement for placement in placed if placement is not None]
        if len(known) < len(placed):
            return None
        parts = [divide(size, emitter.size) for size in sizes]
        op = "aten.split_with_sizes.default"
        return emitter.call_many(op, (x, parts, dim), {}, call.results, known, call.name)

    return _along(emitter, call, along)


@rule("cat", "stack")
def cat(emitter: Emitter, call: Call) -> Result:
    """Join along a dim that isn't the sharded one."""
    call = call.mapped(emitter.reduced)
    values = list(call.values.values())
    sharded = next((value.placement for value in values if isinstance(value.placement, Shard)), None)
    if sharded is None or len({value.ndim for value in values}) > 1:
        return None
    dim = _positive(call["dim"], len(call.shape))
    if call.opname == "cat" and dim == sharded.dim:
        return None
    after = sharded.dim + (call.opname == "stack" and dim <= sharded.dim)
    aligned = call.mapped(lambda value: emitter.redistribute(value, sharded))
    return aligned.emit(emitter, Shard(after, sharded.blocks))


def _reduced_dims(call: Call, x: Value) -> set[int]:
    given = call.get("dim")
    if given is None or given == []:
        return set(range(x.ndim))
    return {_positive(dim, x.ndim) for dim in (given if isinstance(given, (list, tuple)) else [given])}


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "prod")
@rule("any", "all", "argmax", "argmin", "logsumexp", "max", "min", "median")
def reduction(emitter: Emitter, call: Call) -> Result:
    """Over dims: those that are not sharded alone; a sum or mean over the sharded dim leaves terms of a sum."""
    if "other" in call.arguments:
        return pointwise(emitter, call)  # the larger of two tensors' elements
    x = call["self"]
    if x.placement == Partial() and call.opname in ("sum", "mean") and call.dtype == x.dtype:
        return call.emit(emitter, Partial())  # the terms' sums: less to reduce
    x = emitter.reduced(x)
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    dims = _reduced_dims(call, x)
    result: Placement
    if placement.dim in dims:
        if call.several:
            return None
        kinds = {"sum": "sum", "mean": "avg", "amax": "max", "amin": "min"}
        if call.opname not in kinds or not call.dtype.is_floating_point:
            return None
        result = Partial(kinds[call.opname])
    else:
        gone = 0 if call.get("keepdim") else sum(1 for dim in dims if dim < placement.dim)
        result = Shard(placement.dim - gone, placement.blocks)
    return call.emit(emitter, result, self=x)


@rule("linalg_vector_norm", "linalg_norm")
def vector_norm(emitter: Emitter, call: Call) -> Result:
    """Over the sharded dim: of the ranks' norms, each the root of a sum of powers, those sums are added up."""
    x, order = emitter.reduced(call["self"]), call.get("ord")
    dims = _reduced_dims(call, x)
    if call.opname == "linalg_norm":
        if isinstance(order, str) or (order is not None and (call.get("dim") is None or len(dims) > 1)):
            return None  # of matrices
        order = 2 if order is None else order
    if not isinstance(x.placement, Shard) or x.placement.dim not in dims:
        return reduction(emitter, call)
    if emitter.was_gathered(x) or not x.dtype.is_floating_point or order < 0:
        return None
    kind = "max" if order == float("inf") else "sum"
    wide = torch.promote_types(call.dtype, torch.float32)  # the powers may be beyond float16
    arguments, keywords = (x, order, sorted(dims), bool(call.get("keepdim"))), {"dtype": wide}
    op = "aten.linalg_vector_norm.default"
    norm = emitter.call(op, arguments, keywords, call.shape, wide, Partial(kind), call.name)

    def power(value: Value, exponent: float) -> Value:
        if kind == "max" or order in (0, 1):
            return value
        op = "aten.pow.Tensor_Scalar"
        return emitter.call(op, (value, exponent), {}, call.shape, wide, value.placement, f"{call.name}_power")

    whole = power(emitter.reduced(power(norm, order)), 1 / order if order else 1)
    if wide == call.dtype:
        return whole
    return emitter.call("aten._to_copy.default", (whole,), {"dtype": call.dtype}, call.shape, call.dtype, Replicate())


@rule("zeros_like", "ones_like", "full_like")
def filled_like(emitter: Emitter, call: Call) -> Result:
    """Only the shape matters."""
    placement = call["self"].placement
    return call.emit(emitter, placement if isinstance(placement, Shard) else Replicate())


@rule("new_zeros", "new_ones", "new_full")
def filled_new(emitter: Emitter, call: Call) -> Result:
    """Only the dtype and device matter."""
    return call.emit(emitter, Replicate())
