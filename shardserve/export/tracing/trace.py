"""From a plain nn.Module to one functional graph of whole operators, and the signature's dims and conditions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from shardserve.errors import ExportError
from shardserve.export import refusals
from shardserve.export.sources.program import as_traced
from shardserve.export.symbols import Printer
from shardserve.export.tracing import decompose, recurrent
from shardserve.export.tracing.assignments import Assignments
from shardserve.export.tracing.dynamic_dims import check_declared, declared, dim_names, dim_range
from shardserve.shards.config import DimRange


@dataclass(frozen=True)
class Trace:
    """The traced model. Graph nodes carry `meta["val"]`, fake tensors of symbolic shapes."""

    graph: fx.Graph
    tensors: Mapping[str, Tensor]  # parameters, buffers and constants, by their names in the model
    bound: Mapping[fx.Node, str]  # placeholder → which of `tensors` it stands for
    inputs: tuple[tuple[str, fx.Node], ...]  # the tensor inputs, named, in the order of the model's leaves
    constants: Mapping[
        fx.Node, Any
    ]  # placeholders of inputs that aren't tensors: the example's value is part of the graph
    outputs: tuple[tuple[str, Any], ...]
    updates: Mapping[str, fx.Node]  # buffers that the forward changes → what they are afterwards
    printer: Printer
    dims: Mapping[str, DimRange]
    conditions: tuple[str, ...]

    @property
    def fixed(self) -> dict[str, Any]:
        """The values of `constants` by their inputs' names, without those that are None."""
        return {node.name: value for node, value in self.constants.items() if value is not None}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; each module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def ordered(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of forward's parameters, whichever order they were given in."""
    known = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in [*known, *(name for name in kwargs if name not in known)]}


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    program: ExportedProgram | None = None,
) -> Trace:
    """torch.export the model, then make the graph functional while its composite operators stay whole.

    `program`: the model, exported already; then dynamic_shapes is what was said there.
    Raises ExportError for what can't be served: a model that torch.export refuses, that changes its inputs.
    """
    _refuse_layouts({**dict(model.named_parameters()), **dict(model.named_buffers())})
    functional = _functional(model, args, kwargs, dynamic_shapes, program)
    placeholders = [node for node in functional.graph.nodes if node.op == "placeholder"]
    tensors: dict[str, Tensor] = {}
    bound: dict[fx.Node, str] = {}
    inputs: list[fx.Node] = []
    constants: dict[fx.Node, Any] = {}
    for node, spec in zip(placeholders, functional.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta["val"], Tensor):
                inputs.append(node)
            else:
                constants[node] = node.meta["val"]
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ExportError(f"the model uses '{spec.target}', a {spec.kind.name.lower()}; shards hold tensors only")
        assert spec.target is not None
        stored = functional.state_dict.get(spec.target)
        tensors[spec.target] = functional.constants[spec.target] if stored is None else stored
        bound[node] = spec.target
    _refuse_layouts(tensors)
    names = _input_names(inputs, input_names)
    symbols = dim_names(dict(zip(names, inputs, strict=True)), declared(model, args, kwargs, dynamic_shapes))
    printer = Printer(symbols)
    ranges = functional.range_constraints
    dims = {name: dim_range(ranges[symbol]) for symbol, name in symbols.items()}
    returned, updates = _returned(functional)
    out_spec = functional.call_spec.out_spec
    assert out_spec is not None
    return Trace(
        graph=functional.graph,
        tensors=tensors,
        bound=bound,
        inputs=tuple(zip(names, inputs, strict=True)),
        constants=constants,
        outputs=_outputs(returned, out_spec, output_names),
        updates=updates,
        printer=printer,
        dims=dims,
        conditions=_conditions(functional.graph, placeholders, ranges, printer),
    )


def _functional(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    program: ExportedProgram | None,
) -> ExportedProgram:
    """What torch.export makes of the model, or `program`, as a functional graph of operators that a shard may call."""
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights")  # of recurrent layers: no state
        try:
            if program is None:
                check_declared(model, args, kwargs, dynamic_shapes)
                own_args, own_kwargs = _distinct(model, args, kwargs)
                with recurrent.Kept(), Assignments(model) as assigned:
                    program = torch.export.export(model, own_args, own_kwargs, dynamic_shapes=dynamic_shapes)
                assigned.check(program)
            else:
                as_traced(program)
            _refuse_changed_constants(program)
            _write_like(program.graph_module)
            functional: ExportedProgram = program.run_decompositions({})
            further = decompose.table(functional.graph)
            if further:
                functional = program.run_decompositions({**further})
            recurrent.restore(functional.graph)
            refusals.refuse_functions(functional.graph)
        except ExportError:
            raise
        except Exception as error:  # torch.export raises whatever the model's own code raises
            raise ExportError(refusals.explain(error, model, args, kwargs)) from error
    return functional


def _distinct(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, each tensor an object of its own.

    torch.export takes one object in two places (ids and mask that are the same ones, an input that is a parameter) for
    one value, and the graph would read only one of them.
    """
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.detach().clone()
        seen.add(id(tensor))
        return tensor

    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, own, (tuple(args), dict(kwargs)))
    return copied


def _refuse_layouts(tensors: Mapping[str, Tensor]) -> None:
    """ExportError for sparse parameters, buffers and constants, and what else has no elements side by side."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise ExportError(f"'{name}' is a tensor of layout {layout}; shards hold dense ones only: use to_dense()")


def _refuse_changed_constants(program: ExportedProgram) -> None:
    """ExportError if the forward writes into a tensor that isn't a buffer: torch's functional graph can't have that."""
    specs = program.graph_signature.input_specs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    constants = {
        node: spec.target
        for node, spec in zip(placeholders, specs, strict=True)
        if spec.kind is InputKind.CONSTANT_TENSOR
    }
    for node in program.graph.nodes:
        first = node.args[0] if node.args else None
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(first, fx.Node):
            continue
        if first not in constants:
            continue
        schema = node.target._schema
        if schema.is_mutable:
            shape = list(first.meta["val"].shape)
            raise ExportError(
                f"the model changes a tensor of shape {shape} that isn't one of its buffers "
                f"({node.target}{refusals.in_module(node)}): "
                "register it by register_buffer, and have the forward take it from the module"
            )
        if any(result.alias_info for result in schema.returns):
            constants[node] = constants[first]


def _write_like(module: fx.GraphModule) -> None:
    """What `copy_` writes into a whole buffer becomes one of its shape and dtype before: torch's functional graph takes
    the source itself for the buffer's new value, whatever its shape and dtype.
    """
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.copy_.default:
            continue
        target, source = node.args[:2]
        whole = target
        while isinstance(whole.target, torch._ops.OpOverload) and whole.target._schema.is_mutable:
            whole = whole.args[0]
        before, after = source.meta["val"], target.meta["val"]
        if whole.op != "placeholder" or (before.dtype, before.shape) == (after.dtype, after.shape):
            continue
        with module.graph.inserting_before(node):
            converted = module.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": after.dtype})
            written = module.graph.call_function(torch.ops.aten.expand_as.default, (converted, target))
        converted.meta = {**node.meta, "val": before.to(after.dtype)}
        written.meta = dict(node.meta)
        node.update_arg(1, written)
    module.recompile()


def _returned(program: torch.export.ExportedProgram) -> tuple[list[Any], dict[str, fx.Node]]:
    """What the forward returns, flat, and the buffers that it changes with what they are afterwards."""
    (values,) = next(node for node in program.graph.nodes if node.op == "output").args
    assert isinstance(values, (tuple, list))
    returned: list[Any] = []
    updates: dict[str, fx.Node] = {}
    for value, spec in zip(values, program.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            returned.append(value)
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            assert spec.target is not None
            assert isinstance(value, fx.Node)
            updates[spec.target] = value
        else:
            kind = spec.kind.name.lower().replace("_", " ")
            raise ExportError(f"the model changes '{spec.target}' ({kind}); a forward may change its buffers only")
    return returned, updates


def _input_names(inputs: Sequence[fx.Node], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [node.name for node in inputs]
    return _names("input", given, len(inputs))


def _names(what: str, given: Sequence[str], count: int) -> list[str]:
    """`given`, if these are as many names."""
    if len(given) != count or len(set(given)) < len(given):
        raise ExportError(f"{what}_names must name {count} {what}s, each differently; got {list(given)}")
    return list(given)


def _outputs(returned: list[Any], spec: pytree.TreeSpec, given: Sequence[str] | None) -> tuple[tuple[str, Any], ...]:
    paths = _paths(pytree.tree_unflatten(list(range(len(returned))), spec))
    kept = [(path, value) for path, value in zip(paths, returned, strict=True) if value is not None]
    for path, value in kept:
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
            kind = f"{value!r}" if not isinstance(value, fx.Node) else "a number that it computes from sizes or inputs"
            raise ExportError(
                f"the model's output '{_path_name(path)}' is {kind}, not a tensor: return tensors only "
                "(and None, which is left out)"
            )
    if given is not None:
        return tuple((name, value) for name, (_, value) in zip(_names("output", given, len(kept)), kept, strict=True))
    return tuple((_path_name(path), value) for path, value in kept)


def _paths(tree: Any) -> list[tuple[str, ...]]:
    """The keys, outermost first, that lead to each leaf: names where the container has names, else indexes.

    torch's own paths don't know classes that are registered without a function for keys, as the outputs of diffusers.
    """
    kind = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if kind is None:
        return [()]
    if kind.flatten_with_keys_fn is not None:
        children, _ = kind.flatten_with_keys_fn(tree)
        named = [
            (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))), child) for key, child in children
        ]
    else:
        values, names = kind.flatten_fn(tree)
        known = isinstance(names, (list, tuple)) and len(names) == len(values)
        named = list(zip(names if known else range(len(values)), values, strict=True))
    return [(str(name), *path) for name, child in named for path in _paths(child)]


def _path_name(keys: tuple[str, ...]) -> str:
    if not keys:
        return "output"
    return "_".join(keys) if not keys[0].isdecimal() else "_".join(["output", *keys])


def _conditions(
    graph: fx.Graph, placeholders: Sequence[fx.Node], ranges: Mapping[Any, ValueRanges[Any]], printer: Printer
) -> tuple[str, ...]:
    """What tracing assumed of the input dims beyond their ranges: both traces' guards and the graph's assertions."""
    assumed: list[sympy.Basic] = []
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_scalar.default:
            value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
            if isinstance(value, torch.SymBool):
                assumed.append(value.node.expr)
            elif value is False:
                raise ExportError(f"the model asserts what doesn't hold: {node.args[1]}")
    values = [node.meta.get("val") for node in placeholders]
    environments = {id(size.node.shape_env): size.node.shape_env for size in _symbolic_sizes(values)}
    for environment in environments.values():
        assumed += [environment.replace(guard.expr) for guard in environment.guards]
    conditions: list[str] = []
    for expr in assumed:
        expr = sympy.sympify(expr)
        if expr == sympy.true or _follows(expr, ranges):
            continue
        text = printer.condition(expr)
        if text not in conditions:
            conditions.append(text)
    return tuple(conditions)


def _symbolic_sizes(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield from (size for size in value.shape if isinstance(size, torch.SymInt))


def _follows(expr: sympy.Basic, ranges: Mapping[Any, ValueRanges[Any]]) -> bool:
    """Whether the declared ranges alone make the guard true."""
    known = {symbol: interval for symbol, interval in ranges.items() if symbol in expr.free_symbols}
    bound = bound_sympy(expr, known)
    return bool(bound.is_singleton() and bound.lower == sympy.true)
