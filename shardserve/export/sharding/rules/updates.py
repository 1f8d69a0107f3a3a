"""Rules of operators that write part of a tensor: what a forward's change of a buffer becomes in a functional graph.

The target is cut as what is written into it is: of a cache that every rank has whole, a part costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardserve.export.sharding.emit import Call, Emitter, Value
from shardserve.export.sharding.placements import Partial, Replicate, Shard
from shardserve.export.sharding.rules.index import result_dims
from shardserve.export.sharding.rules.table import pointwise, rule

Result = Value | list[Value] | None


def _placed(emitter: Emitter, call: Call, source: str, dims: Mapping[int, int], **changed: Any) -> Result:
    """The call with target and source cut alike. dims: of the target, those that are written in whole → of the source,
    where they are (-1: it has none, or is broadcast there)."""
    target, written = emitter.reduced(call["self"]), emitter.reduced(call[source])
    placement = target.placement
    assert not isinstance(placement, Partial)
    if isinstance(placement, Replicate) and isinstance(written.placement, Shard):
        place = next((dim for dim, at in dims.items() if at == written.placement.dim), None)
        placement = Replicate() if place is None else Shard(place, written.placement.blocks)
    if isinstance(placement, Shard) and placement.dim not in dims:
        return None
    aligned: Replicate | Shard = Replicate()
    if isinstance(placement, Shard) and dims[placement.dim] >= 0:
        aligned = Shard(dims[placement.dim], placement.blocks)
    changed |= {"self": emitter.redistribute(target, placement), source: emitter.redistribute(written, aligned)}
    return call.emit(emitter, placement, **changed)


def _broadcast(target: Sequence[Any], source: Sequence[Any], before: int) -> dict[int, int]:
    """The dims of a target → those of a source that is broadcast to its shape, seen from the last."""
    found: dict[int, int] = {}
    for dim in range(before, len(target)):
        at = dim - len(target) + len(source)
        found[dim] = at if at >= 0 and source[at] == target[dim] and source[at] != 1 else -1
    return found


@rule("copy")
def copy(emitter: Emitter, call: Call) -> Result:
    """src, broadcast, in the dtype of self, of which nothing else is taken."""
    shape = call["src"].shape
    return _placed(emitter, call, "src", _broadcast(call["self"].shape, shape, 0))


@rule("fill")
def fill(emitter: Emitter, call: Call) -> Result:
    """Only the shape and dtype of self matter."""
    return pointwise(emitter, call)


@rule("slice_scatter", "index_copy", "index_add")
def write_along_dim(emitter: Emitter, call: Call) -> Result:
    """Positions of one dim are written; self and source have the same number of dims."""
    source = "src" if call.opname == "slice_scatter" else "source"
    ndim = call["self"].ndim
    if not ndim:
        return None
    dims = {dim: dim for dim in range(ndim) if dim != call["dim"] % ndim}
    index = {"index": emitter.replicated(call["index"])} if "index" in call.arguments else {}
    return _placed(emitter, call, source, dims, **index)


@rule("select_scatter")
def write_one(emitter: Emitter, call: Call) -> Result:
    """One position of one dim is written; the source hasn't that dim."""
    ndim = call["self"].ndim
    gone = call["dim"] % ndim
    return _placed(emitter, call, "src", {dim: dim - (dim > gone) for dim in range(ndim) if dim != gone})


@rule("index_put")
def index_put(emitter: Emitter, call: Call) -> Result:
    """indices: a tensor for each dim that is indexed; the others are written in whole."""
    target, values = call["self"], call["values"]
    indices = call["indices"]
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    if not indexed or any(indices[dim].dtype.itemsize == 1 for dim in indexed):
        return None  # masks: how much is written depends on the data
    order = result_dims(target.ndim, indices)
    dims = {}
    for place, dim in enumerate(order):
        at = place - len(order) + values.ndim
        if dim >= 0:
            dims[dim] = at if at >= 0 and values.shape[at] != 1 else -1
    return _placed(emitter, call, "values", dims, indices=[index and emitter.replicated(index) for index in indices])
