"""The unsharded model, called as its shards are: what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError
from shardserve.export.subgraphs import calling
from shardserve.export.tracing.trace import evaluating, ordered
from shardserve.shards.config import Signature


class Unsharded:
    """Calls of a method of the model with other tensors in the example's places."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        signature: Signature,
        method: str = "forward",
    ) -> None:
        self.model, self.method = model, method
        with calling(model, method):
            self.args, self.kwargs = tuple(args), ordered(model, kwargs or {})
        self._leaves, self._structure = pytree.tree_flatten((self.args, self.kwargs))
        positions = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        if len(positions) != len(signature.inputs):
            raise ExportError(f"the shards take {len(signature.inputs)} tensors, the example has {len(positions)}")
        self._positions = {spec.name: index for spec, index in zip(signature.inputs, positions, strict=True)}
        self.example: Mapping[str, Tensor] = {name: self._leaves[index] for name, index in self._positions.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Its outputs."""
        given = list(self._leaves)
        for name, index in self._positions.items():
            given[index] = inputs[name]
        args, kwargs = pytree.tree_unflatten(given, self._structure)
        with evaluating(self.model), calling(self.model, self.method):
            return [leaf for leaf in pytree.tree_leaves(self.model(*args, **kwargs)) if leaf is not None]


def raised(where: str, error: Exception) -> str:
    """A line on the sizes at which the model raises without being sharded."""
    return f"with {where} the model itself raises {type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def restoring(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """What is done to these buffers of the model in it is undone afterwards: a forward writes into them, or puts
    other tensors in their places.
    """
    before = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        buffer = model.get_buffer(name)
        before.append((model.get_submodule(module), leaf, buffer, buffer.clone()))
    try:
        yield
    finally:
        for owner, leaf, buffer, value in before:
            buffer.copy_(value)
            setattr(owner, leaf, buffer)
