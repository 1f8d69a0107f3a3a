"""What a shard needs of its tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """The collectives of one tensor-parallel group; all ranks call the same ones in the same order.

    Tensors given are contiguous and are not modified. A tensor returned stays valid until the step ends. `op` is one of
    sum, avg, max, min, product. `rank` is the coordinate within the group, `size` the number of its ranks.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """The elementwise reduction over the ranks; the shape of `x`."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` (0-dimensional ones never come), concatenated along dim 0 in rank order."""

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        """This rank's part, along dim 0, of the reduction; the size of dim 0 is a multiple of the group's."""

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        """Part j of `x` along dim 0 goes to rank j; what came, concatenated in rank order."""

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """Rank `src`'s tensor; elsewhere `x` only gives the shape and dtype."""


class SingleRank:
    """The group of one rank, for models that are not tensor-parallel."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        return x

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return x
