"""What a rank's graph costs: FLOPs, bytes, and by them the seconds of a step.

The model: a rank does its operators one after another, each in a fixed time plus the longer of its FLOPs at the
device's rate and its bytes at the memory's bandwidth (weights are read, everything else read and written; views are
free). A stage takes as long as its slowest rank, plus its collectives; a step as long as its stages and the tensors
that go from each to the next. Constants: `Hardware`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from shardserve.errors import ExportError
from shardserve.export import flops
from shardserve.export.flops import product
from shardserve.export.sharding.cut import StageGraph
from shardserve.export.sharding.emit import LocalNode
from shardserve.export.sharding.propagate import Bound, Tensors
from shardserve.export.symbols import Dim, simplify
from shardserve.export.tracing.trace import Trace
from shardserve.shards.regions import VIEWS

_FREE = frozenset(VIEWS - {"to", "_to_copy"})
_LOOKUPS = frozenset({"embedding", "index_select", "gather", "index", "take_along_dim"})  # don't read all of the table


# Mostly into buffers that are kept between steps, where they are: what is written is read and written, nothing else.
_WRITES = frozenset({"slice_scatter", "select_scatter", "index_put", "index_copy"})


@dataclass(frozen=True)
class Hardware:
    """One rank's device and what is between the ranks; all in units, bytes and seconds.

    A collective on n ranks takes `collective_seconds` * (n - 1) and its bytes, those that a rank takes in, at
    `collective_bytes_per_second`. A tensor that goes to the next stage takes `link_seconds` and its bytes at
    `link_bytes_per_second`.
    """

    flops_per_second: float
    bytes_per_second: float
    operator_seconds: float
    collective_seconds: float
    collective_bytes_per_second: float
    link_seconds: float
    link_bytes_per_second: float

    def compute_seconds(self, flops: float, nbytes: float) -> float:
        """An operator that makes these FLOPs and moves these bytes."""
        return self.operator_seconds + max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def collective_time(self, kind: str, nbytes: float, ranks: int) -> float:
        """A collective that each of `ranks` gives `nbytes`."""
        if ranks == 1:
            return 0.0
        taken = nbytes * (ranks - 1) * (1 if kind == "all_gather" else 2 / ranks)
        return self.collective_seconds * (ranks - 1) + taken / self.collective_bytes_per_second

    def link_time(self, nbytes: float) -> float:
        """The tensors of one step, to the next stage."""
        return self.link_seconds + nbytes / self.link_bytes_per_second


CPU = Hardware(
    flops_per_second=100e9,
    bytes_per_second=8e9,
    operator_seconds=4e-6,
    collective_seconds=15e-6,
    collective_bytes_per_second=2e9,
    link_seconds=60e-6,
    link_bytes_per_second=2e9,
)
"""A core of a Xeon (2026) for each rank, all on one host, fp32: rounded from what `make bench-costs` measures."""


class Sizes:
    """Numbers for the sizes of a traced model, at given sizes of its dynamic dims.

    A size that depends on the inputs' values counts as the largest that tracing allows, or 1 where it names none.
    """

    def __init__(self, values: Mapping[sympy.Symbol, int]) -> None:
        self.values = dict(values)
        self._known: dict[sympy.Expr, int] = {}

    @classmethod
    def at(cls, traced: Trace, dims: Mapping[str, int]) -> Sizes:
        """At these sizes of the dims by name; the example's of those that aren't given."""
        unknown = dims.keys() - traced.dims.keys()
        if unknown:
            raise ExportError(f"no dim is named '{min(unknown)}'; there are {', '.join(traced.dims) or 'none'}")
        example = _example(traced)
        return cls({symbol: dims.get(name, example[symbol]) for symbol, name in traced.printer.names.items()})

    @classmethod
    def example(cls, traced: Trace) -> Sizes:
        """At the sizes of the example inputs."""
        return cls.at(traced, {})

    @classmethod
    def largest(cls, traced: Trace) -> Sizes:
        """At the largest size of each dim; the example's where it has no upper end."""
        return cls.at(traced, {name: limit.max for name, limit in traced.dims.items() if limit.max is not None})

    def __call__(self, size: Dim) -> int:
        if isinstance(size, int):
            return size
        if size not in self._known:
            values = {symbol: self.values.get(symbol, 1) for symbol in size.free_symbols}
            self._known[size] = int(size.subs(values))
        return self._known[size]


def _example(traced: Trace) -> dict[sympy.Symbol, int]:
    found: dict[sympy.Symbol, int] = {}
    for _, node in traced.inputs:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                known = size.node.shape_env.backed_var_to_val
                found.update({symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols})
    return found


@dataclass(frozen=True)
class Operation:
    """One node of a rank's graph: FLOPs of matrix products, and bytes that it moves (0 for a view), or, if it is a
    collective, that the rank gives to it.
    """

    op: str
    flops: Dim
    bytes: Dim

    @property
    def collective(self) -> str | None:
        """all_reduce, all_gather or reduce_scatter."""
        kind, _, name = self.op.partition(".")
        return name if kind == "collective" else None


@dataclass(frozen=True)
class RankCost:
    """One pipeline stage on one rank. `sends`: name of each tensor that goes to the next stage → its bytes."""

    operations: tuple[Operation, ...]
    parameter_bytes: int
    sends: Mapping[str, Dim]

    @property
    def flops(self) -> Dim:
        """FLOPs of matrix products of a step, over the dims."""
        return _total(operation.flops for operation in self.operations)

    @property
    def collectives(self) -> tuple[tuple[str, Dim], ...]:
        """Kind and bytes that the rank gives, in order."""
        return tuple((op.collective, op.bytes) for op in self.operations if op.collective is not None)

    def compute_seconds(self, sizes: Sizes, hardware: Hardware = CPU) -> float:
        """What the rank computes in a step, alone."""
        return sum(
            hardware.compute_seconds(sizes(operation.flops), sizes(operation.bytes))
            for operation in self.operations
            if operation.bytes != 0 and operation.collective is None
        )

    def collective_seconds(self, sizes: Sizes, ranks: int, hardware: Hardware = CPU) -> float:
        """A step's collectives of this stage's `ranks` ranks."""
        return sum(hardware.collective_time(kind, sizes(nbytes), ranks) for kind, nbytes in self.collectives)

    def link_seconds(self, sizes: Sizes, hardware: Hardware = CPU) -> float:
        """The tensors to the next stage, in one frame. The last stage's are the model's outputs and don't count so."""
        return hardware.link_time(sum(sizes(nbytes) for nbytes in self.sends.values()))


def stage_seconds(costs: Sequence[RankCost], ranks: int, sizes: Sizes, hardware: Hardware = CPU) -> float:
    """One stage's part of a step: its slowest rank and the collectives of its `ranks` ranks. `costs` are those of all
    of them, or of some that stand for the others.
    """
    compute = max(rank.compute_seconds(sizes, hardware) for rank in costs)
    return compute + costs[0].collective_seconds(sizes, ranks, hardware)


def latency(stages: Sequence[Sequence[RankCost]], ranks: int, sizes: Sizes, hardware: Hardware = CPU) -> float:
    """Seconds of a step alone in the pipeline; `stages[i][j]` is stage i on tensor-parallel rank j of `ranks`."""
    links = sum(costs[0].link_seconds(sizes, hardware) for costs in stages[:-1])
    return sum(stage_seconds(costs, ranks, sizes, hardware) for costs in stages) + links


def interval(stages: Sequence[Sequence[RankCost]], ranks: int, sizes: Sizes, hardware: Hardware = CPU) -> float:
    """Seconds between two steps of a full pipeline: those of its slowest stage."""
    return max(stage_seconds(costs, ranks, sizes, hardware) for costs in stages)


def rank_cost(stage: StageGraph, tensors: Tensors, model: Mapping[str, Tensor]) -> RankCost:
    """The cost of one stage of one coordinate; `model` has the whole tensors, to know which are tied."""
    operations = tuple(operation(node, tensors) for node in stage.nodes)
    sends = {name: nbytes(*tensors[name]) for name in stage.sends}
    return RankCost(operations, parameter_bytes(stage.parameters, model), sends)


def node_flops(node: fx.Node) -> Dim:
    """FLOPs of one call of the traced graph."""
    return traced_operation(node).flops


def traced_operation(node: fx.Node, without: Container[fx.Node] = ()) -> Operation:
    """The cost of one call of the traced graph; the bytes of operands that are in `without` aren't counted."""
    target, value = node.target, node.meta.get("val")
    results = [_tensor(item) for item in (value if isinstance(value, (list, tuple)) else (value,)) if _is_tensor(item)]
    if not isinstance(target, torch._ops.OpOverload) or not results:
        return Operation(str(target), 0, 0)
    operands = [argument for argument in _flat((node.args, node.kwargs)) if isinstance(argument, fx.Node)]
    operands = [argument for argument in operands if _is_tensor(argument.meta.get("val"))]
    opname = target._opname
    if opname in _FREE:
        return Operation(str(target), 0, 0)
    tensors = [_tensor(argument.meta["val"]) for argument in operands]
    counted = _flops(opname, [shape for shape, _ in tensors], [results[0][0]], node.args)
    read = [tensor for argument, tensor in zip(operands, tensors, strict=True) if argument not in without]
    moved = [*(read[1:] if opname in _LOOKUPS and operands[0] not in without else read), *results]
    if opname in _WRITES:
        moved = tensors[1:] * 2
    return Operation(str(target), counted, _total(nbytes(*tensor) for tensor in moved))


def operation(node: LocalNode, tensors: Tensors) -> Operation:
    """The cost of one node of a rank's graph."""
    kind, _, rest = node.op.partition(".")
    opname = rest.partition(".")[0]
    operands = [tensors[source] for source in node.sources if source in tensors]
    if kind == "collective":
        return Operation(node.op, 0, nbytes(*operands[0]))
    result = (node.shape, node.dtype) if node.shape is not None and node.dtype is not None else None
    if kind in ("sym", "getitem") or opname in _FREE:
        return Operation(node.op, 0, 0)
    counted = _flops(opname, [shape for shape, _ in operands], [result[0]] if result else [], node.args)
    read = operands[1:] if opname in _LOOKUPS else operands
    touched = operands[1:] * 2 if opname in _WRITES else [*read, *((result,) if result else ())]
    moved = [nbytes(*tensor) for tensor in touched]
    return Operation(node.op, counted, _total(moved))


def nbytes(shape: tuple[Dim, ...], dtype: torch.dtype) -> Dim:
    """The bytes of a tensor."""
    return product((dtype.itemsize, *shape))


def parameter_bytes(parameters: Sequence[Bound], model: Mapping[str, Tensor]) -> int:
    """The bytes of a rank's parameters; those that are tied, and cut alike, count once."""
    return sum(int(nbytes(bound.shape, bound.dtype)) for bound in distinct(parameters, model))


def distinct(parameters: Sequence[Bound], model: Mapping[str, Tensor]) -> list[Bound]:
    """The first of each parameters that are tied and cut alike."""
    once: dict[Any, Bound] = {}
    for bound in parameters:
        once.setdefault((storage(model[bound.tensor]), bound.shape, bound.placement), bound)
    return list(once.values())


def storage(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors that are one share, also those without memory (meta, fake)."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride(), tensor.dtype)


def activation_bytes(stage: StageGraph, tensors: Tensors, sizes: Sizes) -> int:
    """The most bytes that a step's tensors take at once in this stage: inputs, and each result until its last use.

    What is written into a kept buffer where it is takes nothing; what is copied into one stays until the step is over.
    """
    memory: dict[str, str | None] = {name: name for name in stage.receives}  # name → the tensor that owns its memory
    memory.update({bound.name: None for bound in stage.parameters})
    size = {name: sizes(nbytes(*tensors[name])) for name in stage.receives}
    in_place = _in_place(stage)
    last: dict[str, int] = {}
    for index, node in enumerate(stage.nodes):
        for source in node.sources:
            owner = memory.get(source)
            if owner is not None:
                last[owner] = index
        first = node.sources[0] if node.sources else None
        if node.name in in_place:
            continue
        if _is_view(node) or (node.op == "getitem" and memory.get(first or "") is not None):
            memory[node.name] = memory.get(first or "")
        elif node.shape is not None and node.dtype is not None:
            memory[node.name] = node.name
            size[node.name] = sizes(nbytes(node.shape, node.dtype))
    updates = [kept.update for kept in stage.state if kept.update is not None]
    stay = {memory.get(name) for name in (*stage.receives, *stage.sends, *updates)}
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in stay:
            ends.setdefault(index, []).append(name)
    alive = most = sum(size[name] for name in stage.receives)
    for index, node in enumerate(stage.nodes):
        alive += size.get(node.name, 0)
        most = max(most, alive)
        alive -= sum(size[name] for name in ends.get(index, ()))
    return most


def _in_place(stage: StageGraph) -> set[str]:
    """The results that are a kept buffer, written into: a chain of writes from the buffer to its new value."""
    nodes = {node.name: node for node in stage.nodes}
    found: set[str] = set()
    for kept in stage.state:
        chain: list[str] = []
        name = kept.update
        while name in nodes and nodes[name].op.partition(".")[2].partition(".")[0] in _WRITES:
            chain.append(name)
            name = nodes[name].sources[0]
        if name == kept.bound.name:
            found.update(chain)
    return found


def _is_view(node: LocalNode) -> bool:
    return node.op.startswith("aten.") and node.op.split(".")[1] in _FREE


def _flops(opname: str, operands: Sequence[tuple[Dim, ...]], results: Sequence[tuple[Dim, ...]], args: Any) -> Dim:
    if opname == "convolution":
        opname = "conv_transpose2d" if args[6] else "conv2d"
    if not operands:
        return 0
    equation = args[0] if opname == "einsum" else ""
    return flops.flops(opname, operands, results[0] if results else (), equation)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _tensor(fake: Tensor) -> tuple[tuple[Dim, ...], torch.dtype]:
    return tuple(simplify(size) for size in fake.shape), fake.dtype


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [leaf for item in value.values() for leaf in _flat(item)] if isinstance(value, Mapping) else [value]


def _total(terms: Any) -> Dim:
    return simplify(sympy.Add(*terms))
