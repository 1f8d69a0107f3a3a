"""`verify`: reads the shards back from disk, runs them all, and compares with the unsharded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError, InvalidInput, ShardError
from shardserve.export.threads import ThreadCollective, ThreadGroup
from shardserve.export.trace import evaluating, ordered
from shardserve.progress import Progress, quietly
from shardserve.shards.config import CONFIG_FILE, GRAPH_SUFFIX, DimRange, ShardConfig, Signature
from shardserve.shards.graph import dtype_name
from shardserve.shards.program import Program
from shardserve.shards.weights import Weights

_NEAR = 8
_LARGE = 64  # what stands for the largest size of a dim without an upper end


@dataclass(frozen=True)
class VerifyResult:
    """`max_abs_error` over all outputs and `sizes`; `worst`: where it was; `passed`: within tolerance everywhere."""

    max_abs_error: float
    worst: str
    passed: bool
    sizes: tuple[Mapping[str, int], ...]


class Shards:
    """All local ranks of one export, loaded from `out`."""

    def __init__(self, out: str | Path, name: str, progress: Progress = quietly) -> None:
        folder = Path(out)
        first = ShardConfig.load(folder / "device0" / CONFIG_FILE)
        files = [folder / f"device{rank}" / f"{name}{GRAPH_SUFFIX}" for rank in range(first.rank_size)]
        programs: list[Program] = []
        for rank, file in enumerate(files):
            progress("reading shards", rank, len(files))
            programs.append(Program.load(file, weights=Weights(mapped=True)))
        for rank, program in enumerate(programs):
            if program.config.export_id != first.export_id or program.config.rank != rank:
                raise ShardError(f"{files[rank]} is not rank {rank} of the same export as device0")
        size = first.tensor_parallel_size
        self.stages = [programs[start : start + size] for start in range(0, len(programs), size)]
        self.signature: Signature = first.signature

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of the last stage's first rank; InvalidInput as the server would say it."""
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        dims = self.signature.bind(shapes, {name: dtype_name(tensor.dtype) for name, tensor in inputs.items()})
        carried = [[inputs[spec.name] for spec in self.signature.inputs] for _ in self.stages[0]]
        for stage in self.stages:
            carried = ThreadGroup(len(stage)).run(partial(_step, stage, dims, carried))
        return carried[0]


def _step(
    stage: Sequence[Program], dims: Mapping[str, int], inputs: Sequence[Sequence[Tensor]], rank: ThreadCollective
) -> list[Tensor]:
    """One rank's step; what it gives to others must have the shapes and dtypes that its files say."""
    program = stage[rank.rank]
    tensors = program.run(dims, inputs[rank.rank], rank)
    if rank.given != program.collective_inputs(dims):
        raise ExportError(f"rank {program.config.rank} gives its group {rank.given}, not what its graph file says")
    _check_sent(program, tensors, dims)
    return tensors


def verify(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out: str | Path,
    name: str,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Progress = quietly,
) -> VerifyResult:
    """Compare the shards in `out` with `model` at the example's sizes and at the ends of each dynamic dim's range.

    Inputs of other sizes take their values from the example's, so that ids stay ids and masks stay masks. `progress`
    hears of the shards that are read and of the sizes that are compared.
    """
    shards = Shards(out, name, progress)
    leaves, structure = pytree.tree_flatten((tuple(args), ordered(model, kwargs or {})))
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != len(shards.signature.inputs):
        raise ExportError(f"the shards take {len(shards.signature.inputs)} tensors, the example has {len(tensors)}")
    example = {spec.name: leaves[index] for spec, index in zip(shards.signature.inputs, tensors, strict=True)}
    generator = torch.Generator().manual_seed(0)
    worst, where, passed = 0.0, "", True
    cases = _cases(shards.signature, example)
    for done, dims in enumerate(cases):
        progress("comparing sizes", done, len(cases))
        inputs = _inputs(shards.signature, example, dims, generator) if done else example
        given = list(leaves)
        for spec, index in zip(shards.signature.inputs, tensors, strict=True):
            given[index] = inputs[spec.name]
        call_args, call_kwargs = pytree.tree_unflatten(given, structure)
        with evaluating(model):
            expected = [leaf for leaf in pytree.tree_leaves(model(*call_args, **call_kwargs)) if leaf is not None]
        for spec, got, wanted in zip(shards.signature.outputs, shards.run(inputs), expected, strict=True):
            error = _error(got, wanted)
            if error > worst or not where:
                worst, where = error, f"output '{spec.name}' with {_sizes(dims)}"
            passed = passed and _close(got, wanted, atol, rtol)
    return VerifyResult(worst, where, passed, tuple(cases))


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
    count = 1
    for size in shape:
        count *= size
    return values[torch.randint(values.numel(), (count,), generator=generator)].reshape(tuple(shape))


def _check_sent(program: Program, tensors: Sequence[Tensor], dims: Mapping[str, int]) -> None:
    config = program.config
    for spec, tensor in zip(config.sends, tensors, strict=True):
        expected = config.signature.resolve(spec, dims)
        if tuple(tensor.shape) != expected or dtype_name(tensor.dtype) != spec.dtype:
            raise ExportError(
                f"rank {config.rank}: '{spec.name}' is {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
                f"its config says {spec.dtype} {list(expected)}"
            )


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    same = (got == wanted) | ((got != got) & (wanted != wanted))  # infinities and NaNs that agree are no difference
    difference = (got.double() - wanted.double()).abs().masked_fill(same, 0.0)
    return float("inf") if bool(difference.isnan().any()) else float(difference.max())


def _close(got: Tensor, wanted: Tensor, atol: float, rtol: float) -> bool:
    alike = got.shape == wanted.shape and got.dtype == wanted.dtype
    return alike and torch.allclose(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)


def _sizes(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in dims.items()) or "fixed sizes"
