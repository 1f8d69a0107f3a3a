"""What each operator does with sharded tensors: the table of rules, how one is chosen, and the elementwise ones.

A rule emits the operator on this rank's parts and says how the result lies; it returns None where it has no better way
than the whole tensors. Operators without a rule take whole tensors too: always right, and the report names those that
had to be gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from shardserve.export.sharding.emit import Call, Emitter, Rule, Scalar, Value
from shardserve.export.sharding.placements import Partial, Replicate, Shard

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
    return call.mapped(lambda value: aligned(emitter, value, sharded, len(call.shape))).emit(emitter, sharded)


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
    return is_whole(factor) if isinstance(factor, Value) else isinstance(factor, Scalar) or _is_ordinary(factor)


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
    whole = [value for value in call.values.values() if is_whole(value) and value.shape == call.shape]
    sharded = [value for value in call.values.values() if isinstance(value.placement, Shard)]
    return bool(whole) and all(map(emitter.was_gathered, sharded))


def _added_once(emitter: Emitter, call: Call) -> Value | list[Value] | None:
    """A whole operand added to a pending sum: by one rank, so that the sum may go on pending and take in more terms."""
    if call.opname != "add" or call.shared or call.get("alpha") != 1:
        return None
    sides = [call["self"], call["other"]]
    term = next((side for side in sides if isinstance(side, Value) and side.placement == Partial()), None)
    other = sides[0] if term is sides[1] else sides[1]
    if term is None or not isinstance(other, Value) or not is_whole(other):
        return None
    if term.shape != call.shape or term.dtype != call.dtype:
        return None
    if emitter.coordinate == 0:
        return call.emit(emitter, Partial())
    return emitter.call("aten.alias.default", (term,), {}, call.shape, call.dtype, Partial(), call.name, [other])


def is_whole(value: Value) -> bool:
    return isinstance(value.placement, Replicate)


def aligned(emitter: Emitter, value: Value, result: Shard, ndim: int) -> Value:
    """`value` as an operand of a result sharded so: sharded alike, or whole where it is broadcast along that dim."""
    dim = result.dim - (ndim - value.ndim)
    if dim < 0 or value.shape[dim] == 1:
        return emitter.replicated(value)
    return emitter.redistribute(value, Shard(dim, result.blocks))
