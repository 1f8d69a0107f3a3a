"""Instances of different length in one batch: which dims are padded, how far, and what is cut off again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardserve.errors import ConfigError
from shardserve.servable import PadRule
from shardserve.shards.config import DimRange, Signature, TensorSpec, describe
from shardserve.shards.expressions import parse

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]
Lengths = tuple[int, ...]
Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class PaddedDim:
    """name: in the signature of one instance. sizes: to which it may be padded. multiple: of which it has to be one,
    unless that is beyond the greatest."""

    name: str
    sizes: DimRange
    multiple: int

    def target(self, length: int) -> int:
        rounded = -(-max(length, self.sizes.min) // self.multiple) * self.multiple
        return rounded if self.sizes.max is None else min(rounded, self.sizes.max)


@dataclass(frozen=True)
class PaddedAxis:
    """An axis of an instance's input, the value that fills it, and which of the padded dims it is."""

    axis: int
    value: int | float | bool
    dim: int


class Padding:
    """The padded dims of a model's instances. batched: which inputs have the batch dim `front`.

    The padded size of an exported dim that is static is always that size. Raises ConfigError if `rules` don't fit the
    signature.
    """

    def __init__(
        self, rules: Mapping[str, PadRule], signature: Signature, batched: Sequence[bool], front: int | str
    ) -> None:
        self.dims: list[PaddedDim] = []
        self.axes: dict[int, PaddedAxis] = {}
        names = [spec.name for spec in signature.inputs]
        for name, rule in rules.items():
            if name not in names or not batched[names.index(name)]:
                raise ConfigError(f"pad={{{name!r}: …}}: the model's inputs with a batch dim are {', '.join(names)}")
            self._add(rule, names.index(name), signature, front)
        for i, spec in enumerate(signature.inputs):
            self._check_input(i, spec, batched[i])
        self._check_outputs(signature)
        self._name_derived_outputs(signature)

    def _add(self, rule: PadRule, number: int, signature: Signature, front: int | str) -> None:
        spec = signature.inputs[number]
        where = f"pad={{{spec.name!r}: …}}"
        if rule.axis + 1 >= len(spec.shape):
            raise ConfigError(f"{where}: an instance of {describe(spec.shape[1:])} has no dim {rule.axis}")
        if not _fits(rule.value, spec.dtype):
            raise ConfigError(f"{where}: {rule.value!r} is no {spec.dtype}")
        size = spec.shape[rule.axis + 1]
        if isinstance(size, str) and (size not in signature.dims or size == front):
            raise ConfigError(f"{where}: its dim {rule.axis} is exported as {size}, which can't be padded")
        if isinstance(size, int):
            dim = PaddedDim(_unused(f"length_{number}", signature), DimRange(size, size), 1)
        else:
            dim = PaddedDim(size, signature.dims[size], rule.multiple)
        same = [k for k, other in enumerate(self.dims) if other.name == dim.name]
        if same and self.dims[same[0]] != dim:
            raise ConfigError(f"{where}: dim {size} is padded to another multiple by another input")
        if not same:
            self.dims.append(dim)
        self.axes[number] = PaddedAxis(rule.axis, rule.value, same[0] if same else len(self.dims) - 1)

    def _check_input(self, number: int, spec: TensorSpec, batched: bool) -> None:
        """A padded dim is padded wherever it occurs."""
        own = self.axes.get(number)
        for axis, size in enumerate(spec.shape[1:] if batched else spec.shape):
            if own is not None and axis == own.axis:
                continue
            for dim in self.dims:
                if isinstance(size, str) and dim.name in parse(size).names:
                    raise ConfigError(
                        f"pad: dim {dim.name} is padded, but input {spec.name!r} has it at dim {axis} and isn't"
                    )

    def _check_outputs(self, signature: Signature) -> None:
        """Where a static dim is padded nothing says which of the outputs' dims came of it."""
        for axis in self.axes.values():
            dim = self.dims[axis.dim]
            static = dim.name not in signature.dims
            for spec in signature.outputs if static else ():
                if dim.sizes.min in spec.shape[1:]:
                    raise ConfigError(
                        f"pad: a dim is exported with the fixed size {dim.sizes.min}, and output {spec.name}"
                        f"{describe(spec.shape)} can't be cut back to an instance's length; export that dim as dynamic"
                    )

    def _name_derived_outputs(self, signature: Signature) -> None:
        """A class token in front or a strided convolution is right, and by its size alone nothing tells it from what is
        wrong."""
        padded = {dim.name for dim in self.dims}
        for spec in signature.outputs:
            for size in spec.shape:
                if isinstance(size, str) and size not in padded and (names := parse(size).names & padded):
                    logger.warning(
                        "pad: output %s%s has the size %s, which is derived from a padded dim: an instance gets the "
                        "first elements of the padded output, as many as its own %s gives. They have to be what it "
                        "would get alone, as they aren't of torch.cat([x, x], 1), where padding lies between them",
                        *(spec.name, describe(spec.shape), size, " and ".join(sorted(names))),
                    )

    def instance_specs(self, inputs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
        """The specs of one instance's inputs, given without the batch dim, and the sizes its padded dims may have."""
        specs = list(inputs)
        for number, axis in self.axes.items():
            shape = list(specs[number].shape)
            shape[axis.axis] = self.dims[axis.dim].name
            specs[number] = TensorSpec(specs[number].name, specs[number].dtype, tuple(shape))
        return tuple(specs), {dim.name: DimRange(0, dim.sizes.max) for dim in self.dims}

    def lengths(self, shapes: Shapes) -> Lengths:
        """An instance's own sizes of the padded dims, of the shapes of its inputs."""
        found = [0] * len(self.dims)
        for number, axis in self.axes.items():
            found[axis.dim] = shapes[number][axis.axis]
        return tuple(found)

    def targets(self, lengths: Sequence[Lengths]) -> Lengths:
        """The sizes to which all of these are padded."""
        return tuple(dim.target(max(sizes)) for dim, sizes in zip(self.dims, zip(*lengths, strict=True), strict=True))

    def weight(self, lengths: Lengths) -> int:
        """What an instance of these sizes costs, in elements for each that isn't padded."""
        return prod(self.targets([lengths]))

    def padded_shapes(self, shapes: Shapes, targets: Lengths) -> Shapes:
        """The shapes of an instance's inputs, padded to `targets`."""
        return self._replaced(shapes, lambda axis: (targets[axis.dim],))

    def without_padded(self, shapes: Shapes) -> Shapes:
        """What is left of the shapes without the padded dims."""
        return self._replaced(shapes, lambda axis: ())

    def _replaced(self, shapes: Shapes, sizes: Callable[[PaddedAxis], Shape]) -> Shapes:
        changed = list(shapes)
        for number, axis in self.axes.items():
            shape = shapes[number]
            changed[number] = (*shape[: axis.axis], *sizes(axis), *shape[axis.axis + 1 :])
        return tuple(changed)

    def fill(self, number: int, rows: Sequence[Array], shape: tuple[int, ...]) -> Array:
        """These rows of input `number` in one array of (len(rows), *shape), filled up with the value declared."""
        out = np.full((len(rows), *shape), self.axes[number].value, rows[0].dtype)
        for i, row in enumerate(rows):
            out[i][tuple(map(slice, row.shape))] = row
        return out


def _unused(name: str, signature: Signature) -> str:
    while name in signature.dims:
        name += "_"
    return name


def _fits(value: int | float | bool, dtype: str) -> bool:
    if dtype == "bool":
        return isinstance(value, bool)
    if dtype.startswith(("int", "uint")):
        limits = np.iinfo(dtype)
        return isinstance(value, int) and not isinstance(value, bool) and limits.min <= value <= limits.max
    greatest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return not isinstance(value, bool) and (abs(value) <= greatest or value != value or abs(value) == math.inf)
