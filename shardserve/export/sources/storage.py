"""Modules whose parameters have no memory yet, and giving them their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._device import DeviceContext

from shardserve.errors import ExportError
from shardserve.export.sources.checkpoint import Checkpoint
from shardserve.export.sources.names import named, named_as_in
from shardserve.shards.graph import dtype_name
from shardserve.shards.weights import Entry, private_mapping, tensor_at


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, from the moment they are registered.

    Buffers, and whatever else a constructor computes, are real: what isn't in a checkpoint (rotary frequencies, tables
    of positions) is computed as ever, even under `torch.device("meta")`, which is ignored. Memory is needed for one
    parameter at a time, and only if it is initialised before it is registered. It holds for all threads of the process.
    """
    register, call = nn.Module.register_parameter, DeviceContext.__torch_function__

    def called(self: DeviceContext, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device.type == "meta":
            return func(*args, **(kwargs or {}))
        return call(self, func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else _emptied(param))

    replaced: Any = nn.Module, DeviceContext
    # Module.__setattr__ comes here, too.
    replaced[0].register_parameter, replaced[1].__torch_function__ = registered, called
    try:
        yield
    finally:
        replaced[0].register_parameter, replaced[1].__torch_function__ = register, call


def _emptied(param: nn.Parameter) -> nn.Parameter:
    if param.is_meta or is_lazy(param):
        return param
    empty = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    try:
        # Under its own identity, so that whoever ties it to another module ties the same.
        torch.utils.swap_tensors(param, empty)  # type: ignore[no-untyped-call]
    except RuntimeError:  # somebody has a weak reference to it
        return empty
    return param


@dataclass(frozen=True)
class Filled:
    """What `fill` could not give a value: `missing`, all names of such tensors; and what of the checkpoint no tensor of
    the module took: `unused`."""

    missing: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()

    def check(self, used: Sequence[str]) -> None:
        """ExportError if one of these tensors, which the graph uses, has no value."""
        lacking = [name for name in used if name in self.missing]
        if lacking:
            have = "has no value" if len(lacking) == 1 else "have no values"
            raise ExportError(f"{named(lacking)} {have}: in no weights file, nor computed where the module is made")

    @property
    def warnings(self) -> tuple[str, ...]:
        """For the report."""
        if not self.unused:
            return ()
        count = len(self.unused)
        return (f"weights: the model has no place for {count} tensor{'s' * (count > 1)}: {named(self.unused)}",)


def fill(model: nn.Module, checkpoint: Checkpoint | None) -> Filled:
    """Gives parameters and persistent buffers their values from the checkpoint, by name, without copying.

    Those that have none in it keep the values that they have; those on the meta device are `missing` and get zeros that
    take no memory. Parameters that the checkpoint lacks are `missing` whatever they hold: it is initialisation. Raises
    ExportError for a tensor of another shape or dtype, and for tied weights that differ in the checkpoint.
    """
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                where = f"{prefix}.{name}" if prefix else name
                raise ExportError(f"constant '{where}' is on the meta device, without values: make it elsewhere")
    checkpoint = None if checkpoint is None else named_as_in(model, checkpoint)
    values = {} if checkpoint is None else dict(checkpoint.tensors)
    missing: set[str] = set()
    for group in _groups(model):
        names = [place.name for place in group if place.name in values and place.persistent]
        current = group[0].tensor
        if names:
            assert checkpoint is not None
            for name in names:
                _check(checkpoint, name, values[name], current)
            if any(not torch.equal(values[name], values[names[0]]) for name in names[1:]):
                raise ExportError(f"{named(names)} are one tied weight of the model; in the weights they differ")
            _replace(group, values[names[0]])
            for name in names:
                del values[name]
            continue
        if current.is_meta:
            _replace(group, hollow(current))
        elif checkpoint is None or not group[0].persistent:
            continue
        missing.update(place.name for place in group)
    return Filled(frozenset(missing), tuple(values))


def hollow(tensor: Tensor) -> Tensor:
    """Zeros on the CPU, contiguous, of this shape and dtype, which take no memory until they are written to."""
    count = tensor.numel() * tensor.dtype.itemsize
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return tensor_at(private_mapping(-1, count), Entry(tensor.dtype, tuple(tensor.shape), 0, count))


def has_meta(model: nn.Module) -> bool:
    """Whether one of the module's tensors has no values."""
    return any(place.tensor.is_meta for group in _groups(model) for place in group)


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor."""

    name: str
    tensor: Tensor
    persistent: bool
    put: Callable[[Tensor], None]


def _groups(model: nn.Module) -> list[list[_Place]]:
    """All places of each tensor: tied weights, and modules that are used twice, have several."""
    groups: dict[int, list[_Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                place = _Place(dot + name, parameter, True, _setter(module, name))
                groups.setdefault(id(parameter), []).append(place)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                place = _Place(dot + name, buffer, persistent, _setter(module, name))
                groups.setdefault(id(buffer), []).append(place)
    return list(groups.values())


def _setter(module: nn.Module, name: str) -> Callable[[Tensor], None]:
    return lambda tensor: setattr(module, name, tensor)


def _replace(group: Sequence[_Place], value: Tensor) -> None:
    current: Any = group[0].tensor
    new = nn.Parameter(value, requires_grad=False) if isinstance(current, nn.Parameter) else value
    if isinstance(current, nn.Parameter):
        try:
            # Modules that keep their parameters in a list as well see the new value there.
            torch.utils.swap_tensors(current, new)  # type: ignore[no-untyped-call]
            return
        except RuntimeError:  # somebody has a weak reference to it
            pass
    for place in group:
        place.put(new)


def _check(checkpoint: Checkpoint, name: str, value: Tensor, current: Tensor) -> None:
    if value.shape != current.shape or value.dtype != current.dtype:
        raise ExportError(
            f"{checkpoint.origins[name]}: tensor '{name}' is {_kind(value)}, the model's is {_kind(current)}"
        )


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
