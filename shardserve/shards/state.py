"""The buffers that one rank keeps between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardserve.errors import ShardError
from shardserve.shards.graph import State, to_dtype


@dataclass(frozen=True)
class _Kept:
    owner: str
    state: State
    tensor: Tensor
    initial: Tensor | bool | int | float


class StateStore:
    """Of all subgraphs of one rank. Those of one export share buffers by name."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    @property
    def nbytes(self) -> int:
        """What the buffers take, without what they began as."""
        return sum(kept.tensor.nbytes for kept in self._kept.values())

    def add(self, state: State, owner: str, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Makes the buffer, with its first value, if it isn't there. owner: what the subgraphs that were exported
        together have in common, and no others; weights: what is loaded of the rank's weights file.

        ShardError for one of this name that isn't the same, or that can't be made.
        """
        known = self._kept.get(state.tensor)
        if known is None:
            self._kept[state.tensor] = _make(state, owner, weights, device)
        elif known.owner != owner:
            raise ShardError(
                f"another subgraph keeps a buffer '{state.tensor}', too, and is of another export; those that "
                "share buffers are exported together"
            )
        elif (known.state.dtype, known.state.shape, known.state.fill) != (state.dtype, state.shape, state.fill):
            raise ShardError(
                f"buffer '{state.tensor}' is {state.dtype} {list(state.shape)}, in another subgraph "
                f"{known.state.dtype} {list(known.state.shape)}"
            )

    def tensor(self, name: str) -> Tensor:
        return self._kept[name].tensor

    def reset(self) -> None:
        """All buffers as they were when they were loaded."""
        for kept in self._kept.values():
            if isinstance(kept.initial, Tensor):
                kept.tensor.copy_(kept.initial)
            else:
                kept.tensor.fill_(kept.initial)


def _make(state: State, owner: str, weights: Mapping[str, Tensor], device: torch.device) -> _Kept:
    if state.fill is None:
        initial = weights[state.tensor]
        return _Kept(owner, state, initial.clone(), initial)
    try:
        tensor = torch.full(state.shape, state.fill, dtype=to_dtype(state.dtype), device=device)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ShardError(f"buffer '{state.tensor}': {error}") from error
    return _Kept(owner, state, tensor, state.fill)
