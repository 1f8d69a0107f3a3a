"""Runs placements through the traced graph: one rank's local graph comes out, collectives included."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardserve.errors import ExportError
from shardserve.export.refusals import module_of, operator_advice
from shardserve.export.sharding import rules
from shardserve.export.sharding.emit import Call, Emitter, LocalNode, Unplaceable, Value
from shardserve.export.sharding.placements import Partial, Placement, Replicate, Shard
from shardserve.export.symbols import Dim, simplify
from shardserve.export.tracing.trace import Trace
from shardserve.shards import operators

_CHECKS = frozenset(
    {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
)
"""What the signature already says: dtypes at the inputs, conditions on the dims."""

_OF_THE_BATCH = frozenset({"_native_batch_norm_legit", "_native_batch_norm_legit_functional"})
"""Statistics of the batch, which these return: nothing is drawn or written."""

_SYMBOLIC: dict[Any, str] = {
    torch.sym_float: "float",
    torch.sym_int: "int",
    torch.sym_max: "max",
    torch.sym_min: "min",
    math.floor: "floor",
    math.ceil: "ceil",
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "truediv",
    operator.floordiv: "floordiv",
    operator.neg: "neg",
    operator.pow: "pow",
    pow: "pow",
    math.sqrt: "sqrt",
    math.log: "log",
    math.exp: "exp",
    torch.sym_sqrt: "sqrt",
}


@dataclass(frozen=True)
class Bound:
    """A parameter or constant in a rank's graph: its name there, and in the model."""

    name: str
    tensor: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    placement: Replicate | Shard


@dataclass(frozen=True)
class Kept:
    """How a buffer that the model changes is kept between steps. stage: the pipeline stage that has it; None: what is
    written doesn't depend on the inputs' values (a counter), and each stage has its own.
    """

    placement: Replicate | Shard
    stage: int | None


@dataclass(frozen=True)
class KeptBuffer:
    """Such a buffer in a rank's graph; `update` names what it is after a step, None where the graph only reads it."""

    bound: Bound
    update: str | None
    stage: int | None


Tensors = Mapping[str, tuple[tuple[Dim, ...], torch.dtype]]
"""Name in a rank's graph → local shape and dtype."""


@dataclass(frozen=True)
class LocalGraph:
    """One coordinate's graph over all pipeline stages."""

    coordinate: int
    inputs: tuple[Value, ...]
    parameters: tuple[Bound, ...]
    nodes: tuple[LocalNode, ...]
    outputs: tuple[Value, ...]
    from_data: Mapping[str, bool]
    gathered: Mapping[str, int]
    origins: Mapping[str, tuple[fx.Node, Placement]]  # name of a tensor → which of the traced graph it is, how it lies
    state: tuple[KeptBuffer, ...] = ()
    written: Mapping[str, Value] = field(default_factory=dict)  # of each changed buffer, as it came, wherever it lies

    def meanings(self) -> Tensors:
        """The local shape and dtype of every tensor."""
        found = {value.name: (value.shape, value.dtype) for value in self.inputs}
        kept = [buffer.bound for buffer in self.state]
        found.update({bound.name: (bound.shape, bound.dtype) for bound in (*self.parameters, *kept)})
        for node in self.nodes:
            if node.shape is not None and node.dtype is not None:
                found[node.name] = (node.shape, node.dtype)
        return found


def propagate(
    traced: Trace,
    placements: Mapping[str, Replicate | Shard],
    stages: Mapping[fx.Node, int],
    size: int,
    coordinate: int,
    kept: Mapping[str, Kept] | None = None,
) -> LocalGraph:
    """The graph of tensor-parallel rank `coordinate` of `size`; `kept` are the buffers that a step changes:
    those that this graph does, unless it is one of several subgraphs.

    Nothing is traced again: shapes come from the traced graph and the placements, so no guard can be added here.
    """
    emitter = Emitter(size, coordinate, traced.printer)
    environment: dict[fx.Node, Any] = dict(traced.constants)
    inputs: list[Value] = []
    parameters: list[Bound] = []
    state: dict[str, Bound] = {}
    if kept is None:
        kept = {name: Kept(placements[name], stages.get(node, 0)) for name, node in traced.updates.items()}
    for _, node in traced.inputs:
        value = emitter.declare(node.name, _shape(node.meta["val"]), node.meta["val"].dtype, Replicate(), data=True)
        environment[node] = value
        inputs.append(value)
    for node, tensor in traced.bound.items():
        fake = node.meta["val"]
        placement = kept[tensor].placement if tensor in kept else placements[tensor]
        placement = placement if size > 1 else Replicate()
        changes = tensor in kept and kept[tensor].stage is not None
        value = emitter.declare(node.name, _shape(fake), fake.dtype, placement, data=changes)
        environment[node] = value
        local = emitter.local_shape(value.shape, placement)
        bound = Bound(value.name, tensor, local, fake.dtype, placement)
        if tensor in kept:
            state[tensor] = bound
        else:
            parameters.append(bound)
    last = 0
    written: dict[str, Value] = {}
    updates: dict[str, str] = {}
    changed = {node: [name for name, new in traced.updates.items() if new is node] for node in traced.updates.values()}

    def update(node: fx.Node) -> None:
        for name in changed.get(node, []):
            written[name] = environment[node]
            updates[name] = emitter.redistribute(environment[node], state[name].placement).name

    for node in environment:
        update(node)
    for node in traced.graph.nodes:
        if node.op == "call_function":
            emitter.stage = last = stages[node]
            environment[node] = settled(emitter, node, emit(emitter, node, environment))
            # Here, not at the end: in the stage that has made it.
            update(node)
        elif node.op not in ("placeholder", "output"):
            raise ExportError(f"the traced graph holds '{node.name}' ({node.op}), which shards can't express")
    emitter.stage = last
    outputs = tuple(emitter.replicated(environment[node]) for _, node in traced.outputs)
    return LocalGraph(
        coordinate=coordinate,
        inputs=tuple(inputs),
        parameters=tuple(parameters),
        nodes=tuple(emitter.nodes),
        outputs=outputs,
        from_data=emitter.from_data,
        gathered=emitter.gathered,
        origins=_origins(emitter, environment),
        state=tuple(KeptBuffer(bound, updates.get(name), kept[name].stage) for name, bound in state.items()),
        written=written,
    )


def _origins(emitter: Emitter, environment: Mapping[fx.Node, Any]) -> dict[str, tuple[fx.Node, Placement]]:
    found: dict[str, tuple[fx.Node, Placement]] = {}
    for node, value in environment.items():
        if isinstance(value, Value):
            found.setdefault(value.name, (node, value.placement))
    for source, value in emitter.moved:
        if source in found:
            found.setdefault(value.name, (found[source][0], value.placement))
    return found


def settled(emitter: Emitter, node: fx.Node, value: Any) -> Any:
    """What the users of `node` are given: of several, one reduction, rather than one of each of what they make."""
    pending = isinstance(value, Value) and isinstance(value.placement, Partial) and len(node.users) > 1
    return emitter.reduced(value) if pending else value


def _shape(fake: Tensor) -> tuple[Dim, ...]:
    return tuple(simplify(size) for size in fake.shape)


def emit(emitter: Emitter, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
    """What a call of the traced graph gives on this rank: a Value, a list of them, a size, a Scalar or None."""
    target, meaning = node.target, node.meta.get("val")
    if isinstance(meaning, (int, torch.SymInt)) and not isinstance(meaning, bool):
        return simplify(meaning)
    args = _arguments(node.args, environment)
    if target is operator.getitem:
        return args[0][args[1]]
    if isinstance(meaning, (float, torch.SymFloat)):
        if target in _SYMBOLIC:
            return emitter.scalar(f"sym.{_SYMBOLIC[target]}", args, node.name)
        advice = operator_advice(target._opname) if isinstance(target, torch._ops.OpOverload) else ""
        raise ExportError(f"'{node.name}' computes a number by {target}, which shards can't express{advice}")
    if isinstance(target, torch._ops.OpOverload):
        if target._opname in _CHECKS:
            return None
        call = _call(node, target, args, _arguments(node.kwargs, environment))
        try:
            return rules.emit(emitter, call)
        except Unplaceable as error:
            raise Unplaceable(f"operator {target} ('{node.name}'){_where(node)}: {error}") from error
    if isinstance(meaning, (bool, torch.SymBool)):
        return None  # only assertions take it, and those are conditions of the signature
    raise ExportError(f"'{node.name}' ({target}) isn't an operator that shards can express{_where(node)}")


def _call(node: fx.Node, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    if not operators.is_allowed(op):
        advice = operator_advice(op._opname)
        raise ExportError(f"operator {op}{_part_of(node, op)} isn't one that a shard may call{_where(node)}{advice}")
    meaning = node.meta["val"]
    several = not isinstance(meaning, Tensor)
    results = tuple((_shape(fake), fake.dtype) for fake in (meaning if several else (meaning,)))
    arguments: dict[str, Any] = {}
    for index, argument in enumerate(op._schema.arguments):
        if index < len(args):
            arguments[argument.name] = args[index]
        elif argument.name in kwargs:
            arguments[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    arguments.pop("pin_memory", None)
    if arguments.get("dropout_p") or (arguments.get("training") and op._opname not in _OF_THE_BATCH):
        raise ExportError(f"{op} draws random numbers or updates statistics{_where(node)}")
    return Call(node.name, op, arguments, results, several, len(node.users) > 1)


def _part_of(node: fx.Node, op: torch._ops.OpOverload) -> str:
    """The function that the model calls, where that is taken apart."""
    called = node.meta.get("torch_fn", ("", ""))[1].rpartition(".")[2]
    return f" (of {called})" if called and called != op._opname else ""


def _where(node: fx.Node) -> str:
    module = module_of(node)
    return f" (module '{module}')" if module else ""


def _arguments(value: Any, environment: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return environment[value]
    if isinstance(value, (list, tuple)):
        return [_arguments(item, environment) for item in value]
    if isinstance(value, Mapping):
        return {key: _arguments(item, environment) for key, item in value.items()}
    return value
