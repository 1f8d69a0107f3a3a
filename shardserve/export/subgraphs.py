"""Several ways to call one model, exported together: they share weights, and the buffers that they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from shardserve.errors import ExportError
from shardserve.export.tracing.trace import Trace


@dataclass(frozen=True)
class Subgraph:
    """One of them: `method` of the model, with example inputs, and dims and names as `export` takes them."""

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    method: str = "forward"

    def __post_init__(self) -> None:
        for option in ("input_names", "output_names"):
            given = getattr(self, option)
            if given is None:
                continue
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            if not listed or not all(isinstance(name, str) for name in given):
                raise ExportError(f"{option} is {given!r}: it must be a list of names")


@contextmanager
def calling(model: nn.Module, method: str) -> Iterator[None]:
    """Within it, calling the model calls this method of it. ExportError if it has none."""
    if method == "forward":
        yield
        return
    function = getattr(model, method, None)
    if not callable(function):
        raise ExportError(f"the model has no method '{method}'")
    before = model.__dict__.get("forward")
    model.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = before


def with_own_constants(model: nn.Module, traces: Mapping[str, Trace]) -> dict[str, Trace]:
    """The traces, with names of constants that are no other's: tracing numbers them from 0 each time."""
    common = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *_buffers(model))}
    found = {}
    for subgraph, traced in traces.items():
        names = {name: name if name in common else f"{subgraph}.{name}" for name in traced.tensors}
        tensors = {names[name]: tensor for name, tensor in traced.tensors.items()}
        bound = {node: names[name] for node, name in traced.bound.items()}
        found[subgraph] = replace(traced, tensors=tensors, bound=bound)
    return found


def _buffers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return model.named_buffers(remove_duplicate=False)
