"""Calls of the model become batches, and a batch's outputs become the calls' answers again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardserve.errors import ConfigError, InvalidInput, ShardserveError
from shardserve.servable import Model
from shardserve.shards.config import Signature, TensorSpec, describe
from shardserve.shards.expressions import parse
from shardserve.wire.frames import Payload, split

if TYPE_CHECKING:
    from shardserve.worker.sessions import Session

Array = npt.NDArray[np.generic]
Key = tuple[object, ...]

# Where the exported batch dim has no upper end: a batch has to end somewhere, and queues are bounded per instance.
UNBOUNDED_BATCH = 256


@dataclass(eq=False)
class Call:
    """One instance's run through the model. arrays: in the order of the signature's inputs, without the batch dim.

    deadline: on CLOCK_MONOTONIC, in seconds. subgraph: which of the agents' programs runs it. session: the method call
    of a stateful servable that it belongs to. endings: generations that ended while it was in one of their steps.
    alone: shares neither its batch nor its group's window with any other call.
    """

    arrays: tuple[Array, ...]
    key: Key
    deadline: float | None
    answer: asyncio.Future[tuple[Array, ...]]
    subgraph: int = 0
    session: Session | None = None
    endings: int = 0
    casualties: list[int] = field(default_factory=list)
    alone: bool = False

    def fail(self, error: ShardserveError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True)
class Batch:
    """arrays: the model's inputs, C-contiguous. dims: the sizes of the signature's dynamic dims in this step. subgraph:
    that of all its calls."""

    calls: tuple[Call, ...]
    arrays: tuple[Array, ...]
    dims: dict[str, int]
    subgraph: int = 0


class Batching:
    """Checks inputs against the signature before they become a step, and joins and cuts along the batch dim.

    A batch of a size that the export doesn't take (a static batch dim, or one with conditions) is padded with copies of
    its last instance, whose outputs are cut off.
    """

    def __init__(self, model: Model, signature: Signature) -> None:
        self._model = model
        self._signature = signature
        self._batched = tuple(
            model.with_batch_dim and i not in model.without_batch_dim_inputs for i in range(len(signature.inputs))
        )
        self._dim: str | None = None
        self._size: int | None = None
        self._largest = 1
        self._instance: Signature | None = None
        self.max_size = 1
        if model.with_batch_dim:
            self._find_batch_dim()

    def _find_batch_dim(self) -> None:
        positions, count = self._model.without_batch_dim_inputs, len(self._signature.inputs)
        if any(position >= count for position in positions):
            raise ConfigError(f"without_batch_dim_inputs={positions}, but the model takes {count} inputs")
        batched = [spec for spec, has in zip(self._signature.inputs, self._batched, strict=True) if has]
        fronts = {spec.shape[0] if spec.shape else None for spec in batched}
        if len(fronts) != 1 or None in fronts:
            shapes = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in batched)
            raise ConfigError(f"with_batch_dim=True, but these inputs of the model share no first dim: {shapes}")
        front = fronts.pop()
        if isinstance(front, int):
            self._size = largest = front
        else:
            assert isinstance(front, str)
            if front not in self._signature.dims:
                raise ConfigError(f"with_batch_dim=True, but the batch dim is the expression {front}, not a dim")
            self._dim = front
            largest = self._signature.dims[front].max or UNBOUNDED_BATCH
        self._largest = largest
        self.max_size = min(self._model.max_batch_size or largest, largest)
        if self.max_size > 1:
            self._check_outputs(front)
        self._instance = self._instance_signature(front)

    def _instance_signature(self, front: int | str) -> Signature | None:
        """The inputs as clients know them, without the batch dim: errors then speak of what was sent."""
        inputs = tuple(
            TensorSpec(spec.name, spec.dtype, spec.shape[1:]) if batched else spec
            for spec, batched in zip(self._signature.inputs, self._batched, strict=True)
        )
        dims = {name: bounds for name, bounds in self._signature.dims.items() if name != front}
        if any(spec.names - dims.keys() for spec in inputs):
            return None
        return Signature(dims, inputs, ())

    def _check_outputs(self, dim: int | str) -> None:
        """No part of an output may be of several instances: each would get what was computed for the others."""
        for spec in self._signature.outputs:
            rest = spec.shape[1:]
            mixed = any(isinstance(size, str) and dim in parse(size).names for size in rest)
            if spec.shape[:1] != (dim,) or mixed:
                raise ConfigError(
                    f"with_batch_dim=True, but output {spec.name}{describe(spec.shape)} can't be split into instances: "
                    f"the batch dim {dim} has to be its first, and only that; a model that mixes the instances of a "
                    "batch is declared with_batch_dim=False"
                )

    def check_count(self, given: int) -> None:
        """InvalidInput unless the model takes so many inputs."""
        taken = len(self._signature.inputs)
        if given != taken:
            names = ", ".join(spec.name for spec in self._signature.inputs)
            raise InvalidInput(f"the model takes {taken} inputs ({names}), got {given}")

    def key(self, arrays: Sequence[Array | str | bytes]) -> Key:
        """Calls of the same key may share a batch. InvalidInput if the model doesn't take these values."""
        for spec, value in zip(self._signature.inputs, arrays, strict=True):
            if isinstance(value, str | bytes):
                raise InvalidInput(f"input '{spec.name}' must have dtype {spec.dtype}, got {type(value).__name__}")
        return self._key(cast(Sequence[Array], arrays))

    def _key(self, arrays: Sequence[Array]) -> Key:
        if self._instance is not None:
            specs = self._instance.inputs
            shapes = {spec.name: array.shape for spec, array in zip(specs, arrays, strict=True)}
            self._instance.bind(shapes, {spec.name: a.dtype.name for spec, a in zip(specs, arrays, strict=True)})
        smallest = self._size or (self._signature.dims[self._dim].min if self._dim else 1)
        self._padded_size(arrays, smallest)
        shared = (a.tobytes() for a, batched in zip(arrays, self._batched, strict=True) if not batched)
        return (*(a.shape for a in arrays), *(shared if self._model.with_batch_dim else ()))

    def _padded_size(self, arrays: Sequence[Array], count: int) -> tuple[int, dict[str, int]]:
        """The smallest batch size of at least `count` that the export takes, and the dims with it."""
        dtypes = {spec.name: a.dtype.name for spec, a in zip(self._signature.inputs, arrays, strict=True)}
        refused: InvalidInput | None = None
        for size in range(count, max(self._largest, count) + 1):
            shapes = {
                spec.name: (size, *a.shape) if batched else a.shape
                for spec, a, batched in zip(self._signature.inputs, arrays, self._batched, strict=True)
            }
            try:
                return size, self._signature.bind(shapes, dtypes)
            except InvalidInput as error:
                refused = refused or error
                if not self._signature.conditions:
                    break
        assert refused is not None
        raise refused

    def make_batch(self, calls: Sequence[Call]) -> Batch:
        """One batch of calls that have the same key, at most `max_size` of them."""
        first = calls[0].arrays
        smallest = self._size or (self._signature.dims[self._dim].min if self._dim else 1)
        size, dims = self._padded_size(first, max(len(calls), smallest))
        arrays = []
        for i, batched in enumerate(self._batched):
            if batched:
                rows = [call.arrays[i] for call in calls]
                rows += [rows[-1]] * (size - len(rows))
                arrays.append(np.stack(rows) if size > 1 else np.ascontiguousarray(rows[0])[None])
            else:
                arrays.append(np.ascontiguousarray(first[i]).reshape(first[i].shape))
        return Batch(tuple(calls), tuple(arrays), dims, calls[0].subgraph)

    def split_batch(self, batch: Batch, payload: Payload) -> list[tuple[Array, ...]]:
        """Each call's outputs, in the order of the signature's, as views of the payload."""
        specs = self._signature.outputs
        shapes = [self._signature.resolve(spec, batch.dims) for spec in specs]
        sizes = [int(np.prod(shape)) * dtype_of(spec).itemsize for spec, shape in zip(specs, shapes, strict=True)]
        outputs = [
            view.view(dtype_of(spec)).reshape(shape)
            for spec, shape, view in zip(specs, shapes, split(payload, sizes), strict=True)
        ]
        if not self._model.with_batch_dim:
            return [tuple(outputs)]
        front = self._dim or self._size
        has_batch = [bool(spec.shape) and spec.shape[0] == front for spec in specs]
        return [
            tuple(output[i, ...] if batched else output for output, batched in zip(outputs, has_batch, strict=True))
            for i in range(len(batch.calls))
        ]


def dtype_of(spec: TensorSpec) -> np.dtype[np.generic]:
    return np.dtype(ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype)
