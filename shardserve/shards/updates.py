"""Writes parts of kept buffers where they are, in place of the functional operators that a graph file has for it.

`slice_scatter(buffer, x, …)` makes a new tensor of which most is copied, and the step would copy it once more into the
buffer: for a cache that grows by a row a step, all of it twice. Where nobody reads the buffer's old value afterwards,
the row alone is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Step = tuple[Any, ...]
"""One step from a tensor to a part of it: ("slice", dim, start, end, step) or ("select", dim, index)."""
Place = tuple[Step, ...]

_WRITES = frozenset({"index_put", "index_copy", "index_add", "index_fill", "masked_fill", "scatter", "scatter_add"})
# Never give a view of what they take, beside those that are elementwise.
_FRESH = frozenset(
    {
        "matmul", "mm", "bmm", "baddbmm", "linear", "scaled_dot_product_attention", "softmax", "_softmax", "sum",
        "mean", "amax", "amin", "argmax", "cat", "stack", "index", "index_select", "gather", "clone", "_to_copy",
        "full_like", "zeros_like", "ones_like", "roll", "flip", "cumsum", "repeat",
    }
)  # fmt: skip


def write_in_place(
    graph: fx.Graph, buffer: fx.Node, update: fx.Node, others: Mapping[fx.Node, fx.Node]
) -> fx.Node | None:
    """Rewrites the graph so that computing `update`, the buffer's value after the step, writes it into the buffer.

    Gives the node that does, in whose place `update` was; None, and the graph is as before, where that can't be.
    others: what it has given for other buffers.
    """
    if update is buffer:
        return buffer
    found = _Lowering(buffer, update)
    if not found.lower(update, ()) or not found.allowed(graph, others):
        return None
    with graph.inserting_before(update):
        written = buffer
        for write, place, arguments, _ in found.writes:
            written = graph.call_function(write, (buffer, place, *arguments))
    update.replace_all_uses_with(written)
    for node in reversed(list(graph.nodes)):
        if (node in found.absorbed or node in found.views) and not node.users:
            graph.erase_node(node)
    return written


class _Lowering:
    """absorbed: the operators that become writes. views: the parts of the buffer that those write into."""

    def __init__(self, buffer: fx.Node, update: fx.Node) -> None:
        self.buffer = buffer
        self.update = update
        # Each with the operator whose arguments it takes over: the values meant are those that they have there.
        self.writes: list[tuple[Callable[..., Tensor], Place, tuple[Any, ...], fx.Node]] = []
        self.absorbed: set[fx.Node] = set()
        self.views: set[fx.Node] = set()

    def lower(self, node: fx.Node, place: Place) -> bool:
        """Makes `place` of the buffer hold the value of `node`; False where only a copy would."""
        if self._is_at(node, place):
            return True
        name = _name(node)
        if name not in ("slice_scatter", "select_scatter", "copy") and (name not in _WRITES or node.kwargs):
            return False
        self.absorbed.add(node)
        base, *rest = node.args
        assert isinstance(base, fx.Node)
        if name == "copy":
            # Of its first argument it takes the shape and dtype alone: a view of the buffer there is no read of it.
            if _name(base) in ("slice", "select"):
                self.views.add(base)
            self._add(node, copy_part, place, rest[0])
            return True
        if not self.lower(base, place):
            return False
        if name in _WRITES:
            self._add(node, _writer(node), place, *rest)
            return True
        source, *where = rest
        assert isinstance(source, fx.Node)
        step = ("slice", *_slice(where, node.kwargs)) if name == "slice_scatter" else ("select", *where)
        before = list(self.writes), set(self.absorbed)
        if not self.lower(source, (*place, step)):
            self.writes, self.absorbed = before
            self._add(node, copy_part, (*place, step), source)
        return True

    def _add(self, node: fx.Node, write: Callable[..., Tensor], place: Place, *arguments: Any) -> None:
        self.writes.append((write, place, arguments, node))

    def _is_at(self, node: fx.Node, place: Place) -> bool:
        """Whether the node is this part of the buffer, as a view."""
        if not place:
            return node is self.buffer
        if self.writes:
            # The node is a view of the old value, which earlier writes may have changed by then.
            return False
        kind, *where = place[-1]
        if _name(node) != kind or not isinstance(node.args[0], fx.Node):
            return False
        given = list(node.args[1:])
        same = _slice(given, node.kwargs) == tuple(where) if kind == "slice" else given == where
        if not same or not self._is_at(node.args[0], place[:-1]):
            return False
        self.views.add(node)
        return True

    def allowed(self, graph: fx.Graph, others: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether nobody reads the old value once it is written, nothing is written from it, and nothing from what
        another buffer held before it was written in place."""
        if not all(node is self.update or self._only_inside(node) for node in self.absorbed):
            return False
        order = {node: index for index, node in enumerate(graph.nodes)}
        last = order[self.update]
        old, readers = _views(graph, self.buffer, self.absorbed)
        if any(order[reader] > last for reader in readers):
            return False
        if any(source in old for *_, place, arguments, _ in self.writes for source in _nodes((place, arguments))):
            return False
        # The writes come where the update is, however early the operators are that they stand for.
        for other in (other for other, written in others.items() if order[written] < last):
            views, _ = _views(graph, other, ())
            for _, place, arguments, node in self.writes:
                if order[node] < order[others[other]] and any(source in views for source in _nodes((place, arguments))):
                    return False
        return True

    def _only_inside(self, node: fx.Node) -> bool:
        """Whether nobody else has this value between two writes, and would find that of the last."""
        return all(
            user in self.absorbed or (user in self.views and all(_takes_shape(other, user) for other in user.users))
            for user in node.users
        )


def _views(graph: fx.Graph, buffer: fx.Node, without: Collection[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """The buffer and what may be a view of it, and all that read those but the nodes that are left out."""
    views, readers = {buffer}, []
    for node in graph.nodes:
        if node not in without and any(source in views for source in node.all_input_nodes):
            readers.append(node)
            if not _is_fresh(node):
                views.add(node)
    return views, readers


def _takes_shape(node: fx.Node, view: fx.Node) -> bool:
    return _name(node) == "copy" and node.args[0] is view and view not in node.args[1:]


def _name(node: fx.Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""


def _slice(where: Sequence[Any], keywords: Any) -> tuple[Any, ...]:
    """dim, start, end and step of a slice's arguments."""
    defaults = {"dim": 0, "start": None, "end": None, "step": 1}
    given = dict(zip(defaults, where, strict=False)) | dict(keywords)
    return tuple({**defaults, **given}.values())


def _is_fresh(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or any(result.alias_info for result in op._schema.returns):
        return False
    return torch.Tag.pointwise in op.tags or op._opname in _FRESH


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def copy_part(buffer: Tensor, place: Place, source: Tensor) -> Tensor:
    """Writes a part of the buffer, and gives the buffer."""
    _part(buffer, place).copy_(source)
    return buffer


def _writer(node: fx.Node) -> Callable[..., Tensor]:
    """What does the operator of this node in place, to a part of a buffer; gives the buffer."""
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    in_place = getattr(getattr(torch.ops.aten, f"{op._opname}_"), op._overloadname)

    def write(buffer: Tensor, place: Place, *arguments: Any) -> Tensor:
        in_place(_part(buffer, place), *arguments)
        return buffer

    return write


def _part(tensor: Tensor, place: Place) -> Tensor:
    for kind, *where in place:
        tensor = torch.ops.aten.slice.Tensor(tensor, *where) if kind == "slice" else tensor.select(*where)
    return tensor
