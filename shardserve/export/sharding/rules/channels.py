"""Rules of operators on [batch, channels, …]: convolutions, pooling and norms; and of norms over the last dims."""

from __future__ import annotations

from typing import Any

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Partial, Replicate, Shard
from shardserve.export.sharding.rules.products import one_rank_only
from shardserve.export.sharding.rules.table import rule
from shardserve.export.symbols import Dim, divide

Result = Value | list[Value] | None

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


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def batch_norm_of_the_batch(emitter: Emitter, call: Call) -> Result:
    """The same, by the batch's own mean and variance; the other results are [channels]."""
    x = emitter.reduced(call["input"])
    if not isinstance(x.placement, Shard) or x.placement.dim != 1:
        return None
    channels = Shard(0, x.placement.blocks)
    own = {name: x if name == "input" else emitter.redistribute(value, channels) for name, value in call.values.items()}
    arguments = [own.get(argument.name, call.get(argument.name)) for argument in call.op._schema.arguments]
    placed = [x.placement, *[channels] * (len(call.results) - 1)]
    op = f"aten.{call.opname}.{call.op._overloadname}"
    return emitter.call_many(op, arguments, {}, call.results, placed, call.name)


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


@rule("group_norm", "instance_norm")
def group_norm(emitter: Emitter, call: Call) -> Result:
    """input [batch, channels, …], everything else [channels]: whole groups of channels, or channels, stand alone."""
    x = emitter.reduced(call["input"])
    placement = x.placement
    if not isinstance(placement, Shard) or placement.dim != 1:
        return None
    changed: dict[str, object] = {"input": x}
    if call.opname == "group_norm":
        if isinstance(placement.blocks, tuple) or not placement.divides(call["num_groups"], emitter.size):
            return None
        changed["num_groups"] = call["num_groups"] // emitter.size
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if call.get(name) is not None]
    changed |= {name: emitter.redistribute(call[name], Shard(0, placement.blocks)) for name in names}
    return call.emit(emitter, placement, **changed)


@rule("conv1d", "conv2d", "conv3d")
def convolution(emitter: Emitter, call: Call) -> Result:
    """input [batch, in, …], weight [out, in / groups, …]: by output channels, by input channels, or by groups."""
    x, weight = emitter.reduced(call["input"]), call["weight"]
    channels = x.ndim - weight.ndim + 1
    if call["groups"] != 1:
        outputs, inputs = weight.shape[0], x.shape[channels]
        if weight.placement == Shard(0) and emitter.size > call["groups"]:
            return _part_of_a_group(emitter, call, x, weight, channels)
        return _by_groups(emitter, call, x, weight, channels, inputs, outputs)
    placement = weight.placement
    if placement == Replicate() and isinstance(x.placement, Shard) and x.placement.dim == channels:
        placement = Shard(1, x.placement.blocks)  # a slice of the weight costs nothing
    if not isinstance(placement, Shard) or placement.dim > 1:
        return None
    return _convolved(emitter, call, x, weight, placement, channels, outputs=0)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(emitter: Emitter, call: Call) -> Result:
    """input [batch, in, …], weight [in, out / groups, …]: by output channels, by input channels, or by groups."""
    x, weight = emitter.reduced(call["input"]), call["weight"]
    channels = x.ndim - weight.ndim + 1
    if call["groups"] != 1:
        return _by_groups(emitter, call, x, weight, channels, weight.shape[0], weight.shape[1] * call["groups"])
    placement = weight.placement
    if placement == Replicate() and isinstance(x.placement, Shard) and x.placement.dim == channels:
        placement = Shard(0, x.placement.blocks)
    if not isinstance(placement, Shard) or placement.dim > 1:
        return None
    return _convolved(emitter, call, x, weight, placement, channels, outputs=1)


def _convolved(
    emitter: Emitter, call: Call, x: Value, weight: Value, placement: Shard, channels: int, outputs: int
) -> Result:
    """weight cut along `outputs`, its dim of output channels, or along the other, of input channels."""
    weight, bias = emitter.redistribute(weight, placement), call.get("bias")
    along = Shard(channels, placement.blocks)
    if placement.dim == outputs:
        bias = bias and emitter.redistribute(bias, Shard(0, placement.blocks))
        return call.emit(emitter, along, input=emitter.replicated(x), weight=weight, bias=bias)
    x = emitter.redistribute(x, along)
    bias, beside = one_rank_only(emitter, bias)
    return call.emit(emitter, Partial(), beside, input=x, weight=weight, bias=bias)


def _by_groups(
    emitter: Emitter, call: Call, x: Value, weight: Value, channels: int, inputs: Dim, outputs: Dim
) -> Result:
    """Each group of input channels makes its own output channels: a rank has whole groups of both."""
    given = next((side.placement for side in (weight, x) if side.placement != Replicate()), None)
    if not isinstance(given, Shard) or given.dim != (0 if given is weight.placement else channels):
        return None
    if not _whole_groups(call["groups"], given, outputs, inputs, emitter.size):
        return None
    own, bias = Shard(0, given.blocks), call.get("bias")
    along = Shard(channels, given.blocks)
    return call.emit(
        emitter,
        along,
        input=emitter.redistribute(x, along),
        weight=emitter.redistribute(weight, own),
        bias=bias and emitter.redistribute(bias, own),
        groups=call["groups"] // emitter.size,
    )


def _part_of_a_group(emitter: Emitter, call: Call, x: Value, weight: Value, channels: int) -> Result:
    """Fewer groups than ranks: several make the output channels of one, each from that group's input channels."""
    groups, inputs = call["groups"], x.shape[channels]
    if emitter.size % groups or not isinstance(inputs, int):
        return None
    each, group = inputs // groups, emitter.coordinate * groups // emitter.size
    x, bias = emitter.replicated(x), call.get("bias")
    ends = (channels, each * group, each * (group + 1))
    shape = (*x.shape[:channels], each, *x.shape[channels + 1 :])
    own = emitter.call("aten.slice.Tensor", (x, *ends), {}, shape, x.dtype, Replicate())
    bias = bias and emitter.redistribute(bias, Shard(0))
    return call.emit(emitter, Shard(channels), input=own, weight=weight, bias=bias, groups=1)


def _whole_groups(groups: int, given: Shard, outputs: Dim, inputs: Dim, ranks: int) -> bool:
    if isinstance(given.blocks, tuple):
        # Depthwise, or few channels a group: as many channels come out as go in, so both sides have the same blocks.
        each = divide(outputs, groups)
        return outputs == inputs and each is not None and all(block % (each * ranks) == 0 for block in given.blocks)
    return given.divides(groups, ranks)


@rule("_weight_norm")
def weight_norm(emitter: Emitter, call: Call) -> Result:
    """v [...], g [1, …, n, …, 1]: each of the n parts along `dim` has its norm; dim -1 is one of all of v."""
    if call["dim"] == -1:
        return None
    v, g = emitter.reduced(call["v"]), emitter.reduced(call["g"])
    if not isinstance(v.placement, Shard) or v.placement.dim != call["dim"]:
        return None
    return call.emit(emitter, v.placement, v=v, g=emitter.redistribute(g, v.placement))
