"""Rules of operators that look up, repeat or reorder whole slices: a dim that they don't look at stays cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Partial, Placement, Replicate, Shard
from shardserve.export.sharding.rules.table import rule
from shardserve.export.symbols import divide

Result = Value | list[Value] | None


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


@rule("index")
def index(emitter: Emitter, call: Call) -> Result:
    """indices: a tensor for each dim that is indexed, None for one that is taken whole."""
    x, indices = emitter.reduced(call["self"]), call["indices"]
    indexed = [dim for dim, one in enumerate(indices) if one is not None]
    if not isinstance(x.placement, Shard) or x.placement.dim in indexed:
        return None
    if any(indices[dim].dtype.itemsize == 1 for dim in indexed):
        return None  # masks: how much they take depends on the data
    kept = result_dims(x.ndim, indices)
    placement = Shard(kept.index(x.placement.dim), x.placement.blocks)
    return call.emit(emitter, placement, self=x, indices=[one and emitter.replicated(one) for one in indices])


def result_dims(ndim: int, indices: Sequence[Value | None]) -> list[int]:
    """For each dim of x[indices] the dim of x that it is, -1 for those of the indices: they stand where the indexed
    dims stood, or in front if those stand apart.
    """
    indexed = [dim for dim, one in enumerate(indices) if one is not None]
    whole = [dim for dim in range(ndim) if dim not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = [dim for dim in whole if adjacent and dim < indexed[0]]
    common = max(one.ndim for one in indices if one is not None)
    return [*front, *([-1] * common), *(dim for dim in whole if dim not in front)]


@rule("index_select", "gather", "take_along_dim")
def select_along_dim(emitter: Emitter, call: Call) -> Result:
    """Along one dim by an index: of one dim, or of the result's shape."""
    x, at = emitter.reduced(call["self"]), call["indices" if call.opname == "take_along_dim" else "index"]
    if not isinstance(x.placement, Shard) or call.get("dim") is None or call["dim"] % x.ndim == x.placement.dim:
        return None
    changed: dict[str, Any] = {}
    if call.opname == "index_select":
        changed["index"] = emitter.replicated(at)
    elif at.shape[x.placement.dim] == x.shape[x.placement.dim]:
        changed["indices" if call.opname == "take_along_dim" else "index"] = emitter.redistribute(at, x.placement)
    else:
        return None
    return call.emit(emitter, x.placement, self=x, **changed)


@rule("embedding_bag")
def embedding_bag(emitter: Emitter, call: Call) -> Result:
    """weight [rows, width], ids and where bags begin → [bags, width], and what a gradient would need: by columns."""
    weight = emitter.reduced(call["weight"])
    if not isinstance(weight.placement, Shard) or weight.placement.dim != 1:
        return None
    changed = {name: emitter.replicated(value) for name, value in call.values.items() if name != "weight"}
    arguments = [({**call.arguments, "weight": weight, **changed})[one.name] for one in call.op._schema.arguments]
    # Of the largest elements the last result says for each column where it was.
    placed: list[Placement] = [weight.placement if len(shape) == 2 else Replicate() for shape, _ in call.results]
    op = f"aten.{call.opname}.{call.op._overloadname}"
    return emitter.call_many(op, arguments, {}, call.results, placed, call.name)


@rule("repeat_interleave")
def repeat_interleave(emitter: Emitter, call: Call) -> Result:
    """Each slice of a dim several times in a row: a rank's slices stay together."""
    x = call["self"] if "self" in call.arguments else None
    if x is None or call.get("dim") is None or isinstance(call["repeats"], Value):
        return None
    x = emitter.reduced(x)
    placement = x.placement
    if isinstance(placement, Shard) and isinstance(placement.blocks, tuple) and call["dim"] % x.ndim == placement.dim:
        if not isinstance(call["repeats"], int):
            return None
        placement = Shard(placement.dim, tuple(block * call["repeats"] for block in placement.blocks))
    # output_size is the size of the whole's dim: wrong for a part, and not needed.
    return call.emit(emitter, placement, self=x, output_size=None)


@rule("repeat", "tile")
def repeat(emitter: Emitter, call: Call) -> Result:
    """The whole tensor several times in a row along its dims: along the sharded one that makes as many blocks more."""
    x = emitter.reduced(call["self"])
    placement: Placement = x.placement
    times = list(call["repeats" if call.opname == "repeat" else "dims"])
    times = [1] * (x.ndim - len(times)) + times
    if isinstance(placement, Shard):
        dim = placement.dim + len(times) - x.ndim
        if isinstance(placement.blocks, tuple) and not isinstance(times[dim], int):
            return None
        placement = Shard(dim, placement.blocks * times[dim])  # more of them, or the same sizes again
    return call.emit(emitter, placement, self=x)


@rule("flip", "roll")
def reorder(emitter: Emitter, call: Call) -> Result:
    """dims: those that are reordered; none of roll's are all at once."""
    x = emitter.reduced(call["self"])
    dims = [dim % x.ndim for dim in call["dims"]] if x.ndim else []
    if not isinstance(x.placement, Shard) or x.placement.dim in dims or (call.opname == "roll" and not dims):
        return None
    return call.emit(emitter, x.placement, self=x)


@rule("constant_pad_nd", "pad", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
def pad(emitter: Emitter, call: Call) -> Result:
    """pad: before and after, for the last dim first."""
    name = next(iter(call.values))
    x = emitter.reduced(call[name])
    if not isinstance(x.placement, Shard):
        return None
    amounts = call["pad" if "pad" in call.arguments else "padding"]
    at = 2 * (x.ndim - 1 - x.placement.dim)
    if any(amount != 0 for amount in amounts[at : at + 2]):
        return None
    return call.emit(emitter, x.placement, **{name: x})


@rule("tril", "triu")
def triangle(emitter: Emitter, call: Call) -> Result:
    """Of the last two dims."""
    x = emitter.reduced(call["self"])
    if not isinstance(x.placement, Shard) or x.placement.dim >= x.ndim - 2:
        return None
    return call.emit(emitter, x.placement, self=x)
