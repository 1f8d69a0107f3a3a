"""Rules of operators that move, cut, join or reduce dims."""

from __future__ import annotations

from collections.abc import Sequence

from shardserve.export.emit import Call, Emitter, Value
from shardserve.export.placements import Partial, Placement, Replicate, Shard
from shardserve.export.rules import rule
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
    x = call["self"]
    placement = x.placement
    if isinstance(placement, Shard):
        given = call.get("dim")
        if given is None:
            return None
        dims = {_positive(dim, x.ndim) for dim in (given if isinstance(given, (list, tuple)) else [given])}
        removed = sum(1 for dim in dims if dim < placement.dim and x.shape[dim] == 1)
        placement = Shard(placement.dim - removed, placement.blocks)
    return call.emit(emitter, placement)


@rule("expand")
def expand(emitter: Emitter, call: Call) -> Result:
    """The sharded dim isn't one that is expanded: those have size 1."""
    placement = call["self"].placement
    if isinstance(placement, Shard):
        placement = Shard(placement.dim + len(call.shape) - call["self"].ndim, placement.blocks)
    sizes = list(emitter.local_shape(call.shape, placement))
    return call.emit(emitter, placement, size=sizes)


@rule("select", "unbind", "cumsum", "softmax", "_softmax", "log_softmax", "_log_softmax")
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


@rule("slice", "narrow")
def part_of_dim(emitter: Emitter, call: Call) -> Result:
    """Parts of another dim stand alone; of the sharded one, whole blocks are as many parts."""
    x = emitter.reduced(call["self"])
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    if _positive(call["dim"], x.ndim) != placement.dim:
        return call.emit(emitter, placement, self=x)
    size, kept, start, blocks = (
        x.shape[placement.dim],
        call.shape[placement.dim],
        call.get("start") or 0,
        placement.blocks,
    )
    if not all(isinstance(number, int) for number in (size, kept, start, blocks)) or call.get("step") not in (None, 1):
        return None
    first = start % size if start < 0 else start
    block = size // blocks
    if not kept or first % block or kept % block:
        return None
    ends = (x, placement.dim, first // emitter.size, (first + kept) // emitter.size)
    placed = Shard(placement.dim, kept // block)
    return emitter.call("aten.slice.Tensor", ends, {}, call.shape, call.dtype, placed, call.name)


@rule("glu")
def glu(emitter: Emitter, call: Call) -> Result:
    """One half of a dim by the other: along the sharded one, where the halves are its two blocks."""
    x = emitter.reduced(call["self"])
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    if _positive(call["dim"], x.ndim) != placement.dim:
        return call.emit(emitter, placement, self=x)
    return call.emit(emitter, Shard(placement.dim), self=x) if placement.blocks == 2 else None


@rule("split", "split_with_sizes", "chunk")
def split(emitter: Emitter, call: Call) -> Result:
    """Cut along a dim: along the sharded one only between its blocks."""
    x = emitter.reduced(call["self"])
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    dim = _positive(call["dim"], x.ndim)
    if dim != placement.dim:
        return call.emit(emitter, placement, self=x)
    sizes = [shape[dim] for shape, _ in call.results]
    if placement.blocks != len(sizes) or len(set(sizes)) > 1:
        return None
    parts = [divide(size, emitter.size) for size in sizes]
    return emitter.call_many("aten.split_with_sizes.default", (x, parts, dim), {}, call.results, Shard(dim), call.name)


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


@rule("sum", "mean", "amax", "amin", "var", "any", "all", "argmax", "logsumexp", "prod")
def reduction(emitter: Emitter, call: Call) -> Result:
    """Over dims: those that are not sharded alone; a sum or mean over the sharded dim leaves terms of a sum."""
    x = call["self"]
    if x.placement == Partial() and call.opname in ("sum", "mean") and call.dtype == x.dtype:
        return call.emit(emitter, Partial())  # the terms' sums: less to reduce
    x = emitter.reduced(x)
    placement = x.placement
    if not isinstance(placement, Shard):
        return None
    given = call.get("dim")
    if given is None or given == []:
        dims = set(range(x.ndim))
    else:
        dims = {_positive(dim, x.ndim) for dim in (given if isinstance(given, (list, tuple)) else [given])}
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


_SPATIAL = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)]
_SPATIAL += ["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"]
_SPATIAL += ["upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"]


@rule(*_SPATIAL)
def spatial(emitter: Emitter, call: Call) -> Result:
    """input [batch, channels, …]: each channel of each instance alone."""
    name = next(iter(call.values))
    x = emitter.reduced(call[name])
    if not isinstance(x.placement, Shard) or x.placement.dim >= x.ndim - _spatial_dims(call):
        return None
    return call.emit(emitter, x.placement, **{name: x})


def _spatial_dims(call: Call) -> int:
    return int(call.opname[-2])


@rule("zeros_like", "ones_like", "full_like")
def filled_like(emitter: Emitter, call: Call) -> Result:
    """Only the shape matters."""
    placement = call["self"].placement
    return call.emit(emitter, placement if isinstance(placement, Shard) else Replicate())


@rule("new_zeros", "new_ones", "new_full")
def filled_new(emitter: Emitter, call: Call) -> Result:
    """Only the dtype and device matter."""
    return call.emit(emitter, Replicate())


@rule("_native_batch_norm_legit_no_training")
def batch_norm(emitter: Emitter, call: Call) -> Result:
    """input [batch, channels, …], everything else [channels]: channel by channel; the other two results are empty."""
    x = emitter.reduced(call["input"])
    sharded = isinstance(x.placement, Shard) and x.placement.dim == 1
    if isinstance(x.placement, Shard) and not sharded:
        x = emitter.replicated(x)
    blocks = x.placement.blocks if isinstance(x.placement, Shard) else 1
    channels = Shard(0, blocks) if sharded else Replicate()
    names = ("weight", "bias", "running_mean", "running_var")
    per_channel = [call[name] and emitter.redistribute(call[name], channels) for name in names]
    arguments = (x, *per_channel, False, call["momentum"], call["eps"], True)
    normalized = emitter.call("aten.batch_norm.default", arguments, {}, call.shape, call.dtype, x.placement, call.name)
    return [normalized]


@rule("conv1d", "conv2d", "conv3d")
def convolution(emitter: Emitter, call: Call) -> Result:
    """input [batch, in, …], weight [out, in / groups, …]: by output channels, or by input channels without groups."""
    x, weight, bias = emitter.reduced(call["input"]), call["weight"], call.get("bias")
    placement = weight.placement
    if call["groups"] != 1 or not isinstance(placement, Shard) or placement.dim > 1:
        return None
    if placement.dim == 0:
        bias = bias and emitter.redistribute(bias, placement)
        return call.emit(emitter, Shard(1, placement.blocks), input=emitter.replicated(x), weight=weight, bias=bias)
    own = emitter.replicated(bias) if bias is not None and emitter.coordinate == 0 else None
    x = emitter.redistribute(x, placement)
    return call.emit(emitter, Partial(), input=x, weight=weight, bias=own)
