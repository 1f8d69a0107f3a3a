"""The dims that dynamic_shapes declares: whether the example inputs fit them, and what the signature calls them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
from torch import Tensor, fx, nn
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from shardserve.errors import ExportError
from shardserve.export.symbols import simplify
from shardserve.shards.config import DimRange
from shardserve.shards.expressions import is_name


class Declared(NamedTuple):
    """A tensor among the inputs' leaves: where it is ("batch['ids']"); axis → what dynamic_shapes declares of it."""

    where: str
    tensor: Tensor
    dims: Mapping[Any, Any]


def declared(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> list[Declared]:
    """All tensors, in the order of the leaves; none if there are no dynamic_shapes."""
    if dynamic_shapes is None:
        return []
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if not isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=False))
    found: list[Declared] = []

    def walk(where: str, value: Any, spec: Any) -> None:
        if isinstance(value, Tensor):
            dims = spec if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
            found.append(Declared(where, value, dims))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{where}[{key!r}]", item, spec.get(key) if isinstance(spec, Mapping) else None)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                inner = spec[index] if isinstance(spec, (list, tuple)) and index < len(spec) else None
                walk(f"{where}[{index}]", item, inner)

    for name, value in arguments.items():
        walk(name, value, dynamic_shapes.get(name))
    return found


def check_declared(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> None:
    """ExportError, naming input, axis and dim, for an axis that the example hasn't, and a size of it outside its dim's
    range: torch.export's own errors name none of them."""
    for where, tensor, dims in declared(model, args, kwargs, dynamic_shapes):
        for axis, dim in dims.items():
            if not isinstance(axis, int):
                continue
            if not 0 <= axis < tensor.ndim:
                raise ExportError(
                    f"dynamic_shapes: input '{where}' has no axis {axis}: the example's has the shape "
                    f"{list(tensor.shape)}"
                )
            least, most = getattr(dim, "min", None), getattr(dim, "max", None)
            size = tensor.shape[axis]
            if (isinstance(least, int) and size < least) or (isinstance(most, int) and size > most):
                raise ExportError(
                    f"dynamic_shapes: the example's input '{where}' has size {size} at axis {axis}, which is outside "
                    f"dim '{dim.__name__}', {DimRange(max(least or 0, 1), most)}"
                )


def dim_range(declared: ValueRanges[Any]) -> DimRange:
    # torch.export declares 0 where nothing is said; an input of size 0 is not a request.
    upper = None if declared.upper in (int_oo, sympy.oo) else int(declared.upper)
    return DimRange(max(1, int(declared.lower)), upper)


def dim_names(inputs: Mapping[str, fx.Node], tensors: Sequence[Declared]) -> dict[sympy.Symbol, str]:
    """What the symbols of the traced inputs' sizes are called; `tensors` are the declared ones, in the same order."""
    names: dict[sympy.Symbol, str] = {}
    places = [
        (simplify(size), axis, input_name, tensors[index].dims.get(axis) if index < len(tensors) else None)
        for index, (input_name, node) in enumerate(inputs.items())
        for axis, size in enumerate(node.meta["val"].shape)
    ]
    # What is a size itself has its name before what only another depends on (n of y, x is n + 1).
    for size, axis, input_name, dim in sorted(places, key=lambda place: not isinstance(place[0], sympy.Symbol)):
        for symbol in sorted(getattr(size, "free_symbols", ()), key=str):
            root = getattr(dim, "root", dim)
            name = getattr(root, "__name__", None)
            # A size may be written in another dim than the one that it was declared as.
            written = symbol if dim is None or root is dim else dim.fn(symbol)
            if name is None or not is_name(name) or written != size:
                name = f"{input_name}_{axis}" if is_name(f"{input_name}_{axis}") else f"dim_{len(names)}"
            if symbol not in names:
                names[symbol] = name if name not in names.values() else f"{name}_{len(names)}"
    return names
