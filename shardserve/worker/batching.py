"""Calls of the model become batches, and a batch's outputs become the outputs of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import nsmallest
from math import prod
from typing import Any, cast

import ml_dtypes
import numpy as np

from shardserve.errors import ConfigError, InvalidInput
from shardserve.servable import Model
from shardserve.shards.config import Signature, TensorSpec, describe, holds
from shardserve.shards.expressions import parse, parse_condition
from shardserve.wire.frames import Payload, split
from shardserve.worker.calls import Array, Batch, Call, Key
from shardserve.worker.padding import Lengths, Padding, Shapes

# Where the exported batch dim has no upper end: a batch has to end somewhere, and queues are bounded per instance.
UNBOUNDED_BATCH = 256

# Calls share a batch if what they are padded to is at most so many times the smallest of them.
PAD_LIMIT = 2.0

# Combinations of shapes that a model's checks remember.
FORMS = 1024


class Batching:
    """Checks inputs against the signature before they become a step, and joins and cuts along the batch dim.

    A batch of a size that the export doesn't take (a static batch dim, or one with conditions) is padded with copies of
    its last instance, whose outputs are cut off. Where the model declares `pad`, instances of different length share a
    batch, padded to the greatest of theirs, and each one's outputs are cut back to what its own length gives.
    """

    def __init__(self, model: Model, signature: Signature) -> None:
        self._model = model
        self._signature = signature
        self._batched = tuple(
            model.with_batch_dim and i not in model.without_batch_dim_inputs for i in range(len(signature.inputs))
        )
        self._dim: str | None = None
        self._size: int | None = None
        # Whether its outputs can't be split: then a batch is of one instance, and nothing is added to it.
        self._mixes = False
        # The batch dim's maximum.
        self.exported_size = 1
        self._instance: Signature | None = None
        self._padding: Padding | None = None
        self.max_size = 1
        if model.with_batch_dim:
            front = self._find_batch_dim()
            if model.pad:
                self._padding = Padding(model.pad, signature, self._batched, front)
            self._instance = self._instance_signature(front)
            if self._padding is not None and self._instance is None:
                raise ConfigError("pad: the inputs' other dims depend on the batch dim")
        front_of_outputs = self._dim or self._size
        self._divided = [bool(spec.shape) and spec.shape[0] == front_of_outputs for spec in signature.outputs]
        self._dtypes = tuple(spec.dtype for spec in signature.inputs)
        self._scalars = [
            i for i, spec in enumerate(signature.inputs) if len(spec.shape) == (1 if self._batched[i] else 0)
        ]
        self._output_dtypes = [dtype_of(spec) for spec in signature.outputs]
        # Whether they hold depends on the batch's size; whether the others do doesn't.
        self._conditions_of_size = [text for text in signature.conditions if self._dim in parse_condition(text).names]
        self._other_conditions = [text for text in signature.conditions if text not in self._conditions_of_size]
        # The same shapes come again and again, and working out what they mean takes longer than the rest.
        self._shapes_key = lru_cache(FORMS)(self._find_shapes_key)
        self._fit = lru_cache(FORMS)(self._find_fit)
        self._largest_of = lru_cache(FORMS)(self._find_largest)
        self._outputs = lru_cache(FORMS)(self._find_outputs)

    def _find_batch_dim(self) -> int | str:
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
        self.exported_size = largest
        self.max_size = min(self._model.max_batch_size or largest, largest)
        self._check_outputs(front)
        return front

    def _instance_signature(self, front: int | str) -> Signature | None:
        """The inputs as clients know them, without the batch dim: errors then speak of what was sent."""
        inputs = tuple(
            TensorSpec(spec.name, spec.dtype, spec.shape[1:]) if batched else spec
            for spec, batched in zip(self._signature.inputs, self._batched, strict=True)
        )
        dims = {name: bounds for name, bounds in self._signature.dims.items() if name != front}
        if self._padding is not None:
            inputs, padded = self._padding.instance_specs(inputs)
            dims |= padded
        if any(spec.names - dims.keys() for spec in inputs):
            return None
        return Signature(dims, inputs, ())

    def _check_outputs(self, dim: int | str) -> None:
        """No part of an output may be of several instances, be it of one and its copies: each would get what was
        computed for the others."""
        for spec in self._signature.outputs:
            rest = spec.shape[1:]
            mixed = any(isinstance(size, str) and dim in parse(size).names for size in rest)
            if spec.shape[:1] == (dim,) and not mixed:
                continue
            self._mixes = True
            if self.max_size > 1 or self._smallest > 1:
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

    def inputs(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """An instance's inputs. Clients send a plain number as an array of shape [1]: where the model takes one of
        shape [], it gets that."""
        if not self._scalars:
            return tuple(values)
        given = list(values)
        for i in self._scalars:
            if isinstance(given[i], np.ndarray) and given[i].shape == (1,):
                given[i] = given[i].reshape(())
        return tuple(given)

    def key(self, arrays: Sequence[Array | str | bytes]) -> Key:
        """Calls of the same key may share a batch. InvalidInput if the model doesn't take these values."""
        for spec, value in zip(self._signature.inputs, arrays, strict=True):
            if isinstance(value, str | bytes):
                raise InvalidInput(f"input '{spec.name}' must have dtype {spec.dtype}, got {type(value).__name__}")
        checked = cast(Sequence[Array], arrays)
        key = self._shapes_key(tuple([a.shape for a in checked]), tuple([a.dtype for a in checked]))
        if self._model.with_batch_dim and not all(self._batched):
            return key + tuple(a.tobytes() for a, batched in zip(checked, self._batched, strict=True) if not batched)
        return key

    def _find_shapes_key(self, shapes: Shapes, dtypes: tuple[np.dtype[Any], ...]) -> Key:
        names = tuple(dtype.name if dtype.kind != "O" else "str or bytes" for dtype in dtypes)
        if self._instance is not None:
            inputs = [spec.name for spec in self._instance.inputs]
            given = dict(zip(inputs, shapes, strict=True))
            self._instance.bind(given, dict(zip(inputs, names, strict=True)))
        padded = self._padded_shapes(shapes, [self._own_lengths(shapes)])
        self._fit_of(padded, names, self._smallest)
        # Under conditions only what is padded to the same size is known to be taken together.
        if self._padding is None or self._signature.conditions:
            return padded
        return self._padding.without_padded(shapes)

    @property
    def _smallest(self) -> int:
        return self._size or (self._signature.dims[self._dim].min if self._dim else 1)

    def lengths(self, arrays: Sequence[Array]) -> Lengths:
        """An instance's sizes of the dims that are padded; none if the model declares none."""
        return self._own_lengths(tuple([a.shape for a in arrays])) if self._padding is not None else ()

    def _own_lengths(self, shapes: Shapes) -> Lengths:
        return self._padding.lengths(shapes) if self._padding is not None else ()

    def _padded_shapes(self, shapes: Shapes, lengths: Sequence[Lengths]) -> Shapes:
        """The shapes of an instance's inputs when it shares a batch with others of these lengths."""
        return shapes if self._padding is None else self._padding.padded_shapes(shapes, self._padding.targets(lengths))

    def held_until(self, call: Call) -> float:
        """How long a call waits for others to share its batch: the model's delay, but at most half of the time that it
        has."""
        delay = self._model.max_batch_delay_ms / 1000
        if call.deadline is not None:
            delay = min(delay, (call.deadline - call.arrived) / 2)
        return call.arrived + max(delay, 0.0)

    def largest(self, call: Call) -> int:
        """How many calls of this one's key a batch has at most: under conditions, not every size can be had."""
        if not self._conditions_of_size:
            return self.max_size
        shapes = self._padded_shapes(tuple([a.shape for a in call.arrays]), [call.lengths])
        return self._largest_of(shapes)

    def _find_largest(self, shapes: Shapes) -> int:
        least, dims = self._fit_of(shapes, self._dtypes, self._smallest)
        found = self._first_taken(dims, range(self.exported_size, least, -1))
        return min(found or least, self.max_size)

    def _first_taken(self, dims: dict[str, int], sizes: range) -> int | None:
        """The first of these sizes of a batch that the conditions accept."""
        assert self._dim is not None
        for size in sizes:
            changed = {**dims, self._dim: size}
            if all(holds(condition, changed) for condition in self._conditions_of_size):
                return size
        return None

    def choose(self, calls: Sequence[Call]) -> list[Call]:
        """A batch out of calls that have the same key: the first and, up to `largest`, those that follow; or, where
        lengths differ, those that are nearest to it in length."""
        padding, largest = self._padding, self.largest(calls[0])
        if padding is None:
            return list(calls[:largest])
        weights = {call: padding.weight(call.lengths) for call in calls}
        first = calls[0]
        near = nsmallest(largest, calls, key=lambda call: abs(weights[call] - weights[first]))
        chosen, least = [first], weights[first]
        for call in near:
            if call is first:
                continue
            least = min(least, weights[call])
            greatest = prod(padding.targets([call.lengths, *(other.lengths for other in chosen)]))
            if greatest > PAD_LIMIT * least:
                break
            chosen.append(call)
        return chosen

    def _fit_of(self, shapes: Shapes, dtypes: tuple[str, ...], count: int) -> tuple[int, dict[str, int]]:
        """The smallest batch size of at least `count` that the export takes, and the dims with it. shapes: of each
        instance's inputs. InvalidInput if it takes none."""
        fit = self._fit(shapes, dtypes, count)
        if isinstance(fit, str):
            raise InvalidInput(fit)
        return fit

    def _find_fit(self, shapes: Shapes, dtypes: tuple[str, ...], count: int) -> tuple[int, dict[str, int]] | str:
        # A refusal is returned, so that it is remembered, too.
        specs = self._signature.inputs
        sizes = {
            spec.name: (count, *shape) if batched else shape
            for spec, shape, batched in zip(specs, shapes, self._batched, strict=True)
        }
        try:
            dims = self._signature.measure(sizes, {spec.name: dtype for spec, dtype in zip(specs, dtypes, strict=True)})
        except InvalidInput as error:
            return str(error)
        refusal = self._signature.refusal(dims)
        if refusal is None:
            return count, dims
        if (
            self._dim is not None
            and not self._mixes
            and all(holds(condition, dims) for condition in self._other_conditions)
        ):
            size = self._first_taken(dims, range(count + 1, self.exported_size + 1))
            if size is not None:
                return size, {**dims, self._dim: size}
        return refusal

    def make_batch(self, calls: Sequence[Call]) -> Batch:
        """One batch of calls that have the same key, at most `max_size` of them."""
        first = calls[0].arrays
        shapes = self._padded_shapes(tuple([a.shape for a in first]), [call.lengths for call in calls])
        size, dims = self._fit_of(shapes, self._dtypes, max(len(calls), self._smallest))
        arrays = []
        for i, batched in enumerate(self._batched):
            if batched:
                rows = [call.arrays[i] for call in calls]
                rows += [rows[-1]] * (size - len(rows))
                arrays.append(self._stack(i, rows, shapes[i]))
            else:
                arrays.append(np.ascontiguousarray(first[i]).reshape(first[i].shape))
        suspect = bool(calls[0].endings)
        return Batch(tuple(calls), tuple(arrays), dims, calls[0].subgraph, calls[0].begins, suspect)

    def _stack(self, number: int, rows: list[Array], shape: tuple[int, ...]) -> Array:
        if self._padding is not None and any(row.shape != shape for row in rows):
            return self._padding.fill(number, rows, shape)
        return np.stack(rows) if len(rows) > 1 else np.ascontiguousarray(rows[0])[None]

    def split_batch(self, batch: Batch, payload: Payload) -> list[tuple[Array, ...]]:
        """Each call's outputs, in the order of the signature's, as views of the payload."""
        shapes, sizes = self._outputs(tuple(batch.dims.items()))
        views = split(payload, sizes)
        outputs = [
            view.view(dtype).reshape(shape)
            for view, dtype, shape in zip(views, self._output_dtypes, shapes, strict=True)
        ]
        if not self._model.with_batch_dim:
            return [tuple(outputs)]
        results = [
            tuple(
                [output[i, ...] if batched else output for output, batched in zip(outputs, self._divided, strict=True)]
            )
            for i in range(len(batch.calls))
        ]
        if self._padding is None:
            return results
        return [self._cut(result, call, batch.dims) for result, call in zip(results, batch.calls, strict=True)]

    def _find_outputs(self, dims: tuple[tuple[str, int], ...]) -> tuple[Shapes, list[int]]:
        """The shapes of the outputs with these dims, and their sizes in bytes."""
        sizes = dict(dims)
        shapes = tuple(self._signature.resolve(spec, sizes) for spec in self._signature.outputs)
        bytes_of = zip(shapes, self._output_dtypes, strict=True)
        return shapes, [prod(shape) * dtype.itemsize for shape, dtype in bytes_of]

    def _cut(self, outputs: tuple[Array, ...], call: Call, dims: dict[str, int]) -> tuple[Array, ...]:
        """One instance's outputs, in the shapes that they have for its own lengths."""
        assert self._padding is not None
        own = {dim.name: length for dim, length in zip(self._padding.dims, call.lengths, strict=True)}
        cut = []
        for spec, output in zip(self._signature.outputs, outputs, strict=True):
            shape = self._signature.resolve(spec, dims | own)[-output.ndim :] if output.ndim else ()
            cut.append(output[tuple(slice(max(0, size)) for size in shape)] if shape != output.shape else output)
        return tuple(cut)


def dtype_of(spec: TensorSpec) -> np.dtype[np.generic]:
    return np.dtype(ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype)
