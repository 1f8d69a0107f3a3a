"""`verify`: reads the shards back from disk, runs them all, and compares with the unsharded model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError, InvalidInput
from shardserve.export.compare import abs_error, close, relative_error
from shardserve.export.parting import where_they_part
from shardserve.export.running import Shards
from shardserve.export.trace import evaluating, ordered
from shardserve.progress import Progress, quietly
from shardserve.shards.config import DimRange, Signature
from shardserve.shards.graph import dtype_name

_NEAR = 8
_LARGE = 64  # what stands for the largest size of a dim without an upper end


@dataclass(frozen=True)
class OutputError:
    """How far an output is from the unsharded model's, over all sizes that were compared.

    `max_abs`: the largest difference of an element; `max_relative`: the largest, over the sizes, of that difference
    divided by the largest magnitude in the output; `where`: the sizes of `max_abs`.
    """

    name: str
    max_abs: float
    max_relative: float
    where: str


@dataclass(frozen=True)
class VerifyResult:
    """`max_abs_error` over all outputs and `sizes`; `worst`: where it was; `passed`: within tolerance everywhere; else
    `parting`: a sentence on the first pipeline stage whose values aren't the unsharded model's.
    """

    max_abs_error: float
    worst: str
    passed: bool
    sizes: tuple[Mapping[str, int], ...]
    outputs: tuple[OutputError, ...] = ()
    parting: str = ""


def verify(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out: str | Path,
    name: str,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Progress = quietly,
    inputs: Mapping[str, Tensor] | None = None,
    dynamic_shapes: Any = None,
) -> VerifyResult:
    """Compare the shards in `out` with `model` at the example's sizes and at the ends of each dynamic dim's range.

    `inputs`, by the signature's names, take the place of the example's tensors. Inputs of other sizes take their values
    from these, so that ids stay ids and masks stay masks. `progress` hears of the shards that are read and of the sizes
    that are compared. `dynamic_shapes`, those of the export, are for tracing the model again where values part. Raises
    InvalidInput for inputs that the model doesn't take. A model that changes its buffers does two steps of each size,
    and gets its buffers back.
    """
    shards = Shards(out, name, progress)
    call = _Call(model, args, kwargs, shards.signature)
    example = call.example
    if inputs is not None:
        shards.bind(inputs)
        example = {spec.name: inputs[spec.name] for spec in shards.signature.inputs}
    generator = torch.Generator().manual_seed(0)
    errors = [_Worst(spec.name) for spec in shards.signature.outputs]
    failed: Mapping[str, Tensor] | None = None
    cases = _cases(shards.signature, example)
    state = _state(model, shards)
    for done, dims in enumerate(cases):
        progress("comparing sizes", done, len(cases))
        given = _inputs(shards.signature, example, dims, generator) if done else example
        with _as_it_was(state, shards):
            for again in ("", " in a second step")[: 2 if state else 1]:
                for worst, got, wanted in zip(errors, shards.run(given), call.expected(given), strict=True):
                    worst.take(got, wanted, _sizes(dims) + again)
                    if failed is None and not close(got, wanted, atol, rtol):
                        failed = given
    found = tuple(worst.error() for worst in errors)
    largest = max(found, key=lambda error: error.max_abs)
    parting = ""
    if failed is not None:
        try:
            example_kwargs = ordered(model, kwargs or {})
            with _as_it_was(state, shards):
                parting = where_they_part(shards, model, args, example_kwargs, dynamic_shapes, failed, atol, rtol)
        except ExportError as error:
            parting = f"where they part can't be told: {error}"
    where = f"output '{largest.name}' with {largest.where}"
    return VerifyResult(largest.max_abs, where, failed is None, tuple(cases), found, parting)


class _Call:
    """Calls of the model with other tensors in the example's places."""

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, signature: Signature
    ) -> None:
        self.model = model
        self._leaves, self._structure = pytree.tree_flatten((tuple(args), ordered(model, kwargs or {})))
        positions = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        if len(positions) != len(signature.inputs):
            raise ExportError(f"the shards take {len(signature.inputs)} tensors, the example has {len(positions)}")
        self._positions = {spec.name: index for spec, index in zip(signature.inputs, positions, strict=True)}
        self.example: Mapping[str, Tensor] = {name: self._leaves[index] for name, index in self._positions.items()}

    def expected(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The unsharded model's outputs."""
        given = list(self._leaves)
        for name, index in self._positions.items():
            given[index] = inputs[name]
        args, kwargs = pytree.tree_unflatten(given, self._structure)
        with evaluating(self.model):
            return [leaf for leaf in pytree.tree_leaves(self.model(*args, **kwargs)) if leaf is not None]


class _Worst:
    """The largest errors of one output so far."""

    def __init__(self, name: str) -> None:
        self._name, self._abs, self._relative, self._where = name, 0.0, 0.0, ""

    def take(self, got: Tensor, wanted: Tensor, where: str) -> None:
        """Another comparison."""
        error = abs_error(got, wanted)
        if error > self._abs or not self._where:
            self._abs, self._where = error, where
        self._relative = max(self._relative, relative_error(got, wanted))

    def error(self) -> OutputError:
        return OutputError(self._name, self._abs, self._relative, self._where)


def _state(model: nn.Module, shards: Shards) -> list[Tensor]:
    """The model's own of the buffers that the shards keep between steps."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return [buffers[name] for name in shards.state]


@contextmanager
def _as_it_was(state: Sequence[Tensor], shards: Shards) -> Iterator[None]:
    """Steps in it begin with the buffers as exported; the model's own are put back."""
    before = [buffer.clone() for buffer in state]
    shards.reset()
    try:
        yield
    finally:
        for buffer, value in zip(state, before, strict=True):
            buffer.copy_(value)


def _cases(signature: Signature, example: Mapping[str, Tensor]) -> list[Mapping[str, int]]:
    """The sizes of the dims to compare at, each once; first those of the example itself."""
    shapes = {name: tuple(tensor.shape) for name, tensor in example.items()}
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in example.items()}
    cases: list[Mapping[str, int]] = [signature.bind(shapes, dtypes)]
    for wanted in _sizes_to_try(signature.dims, cases[0]):
        dims = _nearest(signature, wanted, dtypes)
        if dims is not None and dims not in cases:
            cases.append(dims)
    return cases


def _inputs(
    signature: Signature, example: Mapping[str, Tensor], dims: Mapping[str, int], generator: torch.Generator
) -> Mapping[str, Tensor]:
    return {spec.name: _like(example[spec.name], signature.resolve(spec, dims), generator) for spec in signature.inputs}


def _nearest(signature: Signature, wanted: Mapping[str, int], dtypes: Mapping[str, str]) -> Mapping[str, int] | None:
    """These sizes, or the next that the signature's conditions allow; None where none is near."""
    for step in sorted(range(-_NEAR, _NEAR + 1), key=lambda step: (abs(step), -step)):
        dims = {name: size + step for name, size in wanted.items()}
        if all(dims[name] in interval for name, interval in signature.dims.items()):
            shapes = {spec.name: signature.resolve(spec, dims) for spec in signature.inputs}
            try:
                return signature.bind(shapes, dtypes)
            except InvalidInput:
                continue
    return None


def _sizes_to_try(dims: Mapping[str, DimRange], example: Mapping[str, int]) -> list[dict[str, int]]:
    """All dims at their smallest, next, an even and an odd size; then each in turn at its ends, the others as given."""
    if not dims:
        return []
    largest = {
        name: max(_LARGE, interval.min) if interval.max is None else interval.max for name, interval in dims.items()
    }

    def clamped(offsets: Mapping[str, int]) -> dict[str, int]:
        return {name: min(interval.min + offsets[name], largest[name]) for name, interval in dims.items()}

    chosen = [clamped(dict.fromkeys(dims, offset)) for offset in (0, 1)]
    for parity in (0, 1):
        chosen.append(clamped({name: 4 + (interval.min + parity) % 2 for name, interval in dims.items()}))
    for name, interval in dims.items():
        chosen += [
            {**example, name: size} for size in (interval.min, interval.min + 1, largest[name]) if size in interval
        ]
    return chosen


def _like(example: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A tensor of this shape with values drawn from the example's; where those are all the same, normal floats.

    What has two values or one is a mask, and is stretched, so that padding stays where it was.
    """
    values = example.detach().flatten()
    if not values.is_floating_point() and len(set(values.tolist())) <= 2:
        for axis, size in enumerate(shape):
            example = example.index_select(axis, torch.arange(size) * example.shape[axis] // max(size, 1))
        return example
    if values.is_floating_point() and (not values.numel() or bool((values == values[0]).all())):
        return torch.randn(tuple(shape), generator=generator).to(example.dtype)
    chosen = torch.randint(values.numel(), (math.prod(shape),), generator=generator)
    return values[chosen].reshape(tuple(shape))


def _sizes(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in dims.items()) or "fixed sizes"
