"""The sizes at which shards are compared with the unsharded model, and inputs of these sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardserve.errors import InvalidInput
from shardserve.shards.config import DimRange, Signature
from shardserve.shards.graph import dtype_name

NEAR = 8
LARGE = 64  # what stands for the largest size of a dim without an upper end


def bind(signature: Signature, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of the dims that these inputs have; InvalidInput for what the model doesn't take."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return signature.bind(shapes, {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()})


def cases(signature: Signature, example: Mapping[str, Tensor]) -> list[Mapping[str, int]]:
    """The sizes of the dims to compare at, each once; first those of the example itself."""
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in example.items()}
    found: list[Mapping[str, int]] = [bind(signature, example)]
    for wanted in _sizes_to_try(signature.dims, found[0]):
        dims = nearest(signature, wanted, dtypes)
        if dims is not None and dims not in found:
            found.append(dims)
    return found


def inputs_of(
    signature: Signature, example: Mapping[str, Tensor], dims: Mapping[str, int], generator: torch.Generator
) -> Mapping[str, Tensor]:
    """Inputs of these sizes, their values drawn from the example's."""
    return {spec.name: _like(example[spec.name], signature.resolve(spec, dims), generator) for spec in signature.inputs}


def nearest(signature: Signature, wanted: Mapping[str, int], dtypes: Mapping[str, str]) -> Mapping[str, int] | None:
    """These sizes, or the next that the signature's conditions allow; None where none is near."""
    for step in sorted(range(-NEAR, NEAR + 1), key=lambda step: (abs(step), -step)):
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
        name: max(LARGE, interval.min) if interval.max is None else interval.max for name, interval in dims.items()
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


def in_words(dims: Mapping[str, int]) -> str:
    """ "batch = 2, length = 8"."""
    return ", ".join(f"{name} = {size}" for name, size in dims.items()) or "fixed sizes"
