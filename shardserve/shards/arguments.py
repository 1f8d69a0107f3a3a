"""Whether a graph's call has the arguments that its operator takes, so that a file that was tampered with is refused
when it is loaded. What only the tensors' sizes decide, the operators say themselves, at a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch

from shardserve.errors import ShardError
from shardserve.shards import operators
from shardserve.shards.graph import Device, Ref, Size

Kind = Literal["tensor", "results", "integer", "number"]
"""What a node gives: a tensor, several of them, an integer, or a number that isn't one."""

# Of integers these give integers, which could double their digits from node to node.
_GROWING = frozenset({"add", "sub", "mul", "floordiv", "neg", "pow", "min", "max"})
_MAX_EXPONENT = 64


def check(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Kind:
    """What the call gives; ShardError if it can't be done. `args` and `kwargs` are decoded, `kinds` are those of all
    names that are defined before.
    """
    target = operators.resolve(op)
    if isinstance(target, torch._ops.OpOverload):
        _check_schema(op, target, args, kwargs, kinds)
        return _returns(target)
    if kwargs:
        raise ShardError(f"{op} takes no {', '.join(sorted(kwargs))}")
    family, _, name = op.partition(".")
    if family == "sym":
        return _check_symbolic(name, args, kinds)
    if op == "getitem":
        if len(args) != 2 or _kind(args[0], kinds) != "results" or not _is_literal(args[1]):
            raise ShardError("getitem takes an operator's results and the position of one")
    else:
        _check_kernel(op, target, args, kinds)
    return "tensor"


def _check_schema(
    op: str,
    target: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kinds: Mapping[str, Kind],
) -> None:
    parameters = _parameters(target)
    unknown = kwargs.keys() - {name for name, *_ in parameters}
    if unknown:
        raise ShardError(f"{op} takes no {', '.join(sorted(unknown))}")
    if len(args) > len(parameters):
        raise ShardError(f"{op} takes {len(parameters)} arguments, got {len(args)}")
    for index, (name, expected, optional) in enumerate(parameters):
        if index < len(args):
            if name in kwargs:
                raise ShardError(f"{op} is given {name} twice")
            value = args[index]
        elif name in kwargs:
            value = kwargs[name]
        elif optional:
            continue
        else:
            raise ShardError(f"{op} needs {name}")
        # Pinned memory belongs to a CUDA driver, which a CPU rank may not have.
        if not _fits(value, expected, kinds) or (name == "pin_memory" and value):
            raise ShardError(f"{op} can't take {value!r} as its {name}, which is {expected}")


@lru_cache(maxsize=1024)
def _parameters(target: torch._ops.OpOverload) -> tuple[tuple[str, str, bool], ...]:
    """Name, type, and whether it has a default."""
    return tuple((a.name, str(a.real_type), a.has_default_value()) for a in target._schema.arguments)


def _returns(target: torch._ops.OpOverload) -> Kind:
    returns = [str(result.type) for result in target._schema.returns]
    return "tensor" if returns == ["Tensor"] else "results"


def _fits(value: Any, expected: str, kinds: Mapping[str, Kind]) -> bool:
    if expected.startswith("Optional["):
        return value is None or _fits(value, expected[9:-1], kinds)
    if expected.startswith("List["):
        element = expected[5:-1]
        if isinstance(value, list):
            return all(_fits(item, element, kinds) for item in value)
        if element in ("Tensor", "Optional[Tensor]"):
            return _kind(value, kinds) == "results"
        return element == "int" and _fits(value, element, kinds)  # PyTorch repeats a single one
    exact: Mapping[str, type] = {
        "str": str,
        "Device": Device,
        "ScalarType": torch.dtype,
        "Layout": torch.layout,
        "MemoryFormat": torch.memory_format,
    }
    if expected in exact:
        return isinstance(value, exact[expected])
    kind = _kind(value, kinds)
    if expected == "Tensor":
        return kind in ("tensor", "integer", "number")  # numbers are made tensors
    if expected in ("int", "bool"):
        return kind == "integer"
    return expected in ("float", "number", "complex") and kind in ("integer", "number")


def _kind(value: Any, kinds: Mapping[str, Kind]) -> Kind | None:
    if isinstance(value, Ref):
        return kinds.get(value.name)
    if isinstance(value, (int, Size)):
        return "integer"
    return "number" if isinstance(value, float) else None


def _is_literal(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_symbolic(name: str, args: Sequence[Any], kinds: Mapping[str, Kind]) -> Kind:
    given = [_kind(value, kinds) for value in args]
    counts = (1,) if name in ("float", "int", "neg", "sqrt", "log", "exp", "floor", "ceil") else (2,)
    if len(given) not in counts or not all(kind in ("integer", "number") for kind in given):
        raise ShardError(f"sym.{name} takes {counts[0]} number{'s' * (counts[0] > 1)}")
    if name in _GROWING and "number" not in given:
        # A negative power of an integer is a fraction.
        if name == "pow" and _is_literal(args[1]) and -_MAX_EXPONENT <= args[1] < 0:
            return "number"
        raise ShardError(f"sym.{name} of integers: write an expression")
    return "integer" if name in ("int", "floor", "ceil") else "number"


def _check_kernel(op: str, kernel: Callable[..., Any], args: Sequence[Any], kinds: Mapping[str, Kind]) -> None:
    """Our own kernels say by their annotations what they take."""
    parameters = list(inspect.signature(kernel).parameters.values())
    if len(args) > len(parameters) or any(p.default is p.empty for p in parameters[len(args) :]):
        raise ShardError(f"{op} takes {', '.join(p.name for p in parameters)}; got {len(args)} arguments")
    types = {"Tensor": ("tensor",), "int": ("integer",), "bool": ("integer",), "float": ("integer", "number")}
    for parameter, value in zip(parameters, args, strict=False):
        base, _, optional = str(parameter.annotation).partition(" | ")
        if value is None and optional == "None":
            continue
        if base in types and _kind(value, kinds) not in types[base]:
            raise ShardError(f"{op} can't take {value!r} as its {parameter.name}, which is {base}")
