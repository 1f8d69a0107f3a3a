"""What gloo and NCCL have in common: the collectives of a torch process group, behind our interface."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shardserve.agent.collectives.errors import CollectiveBroken, check_splits, rows_of_a_part
from shardserve.agent.collectives.group import GroupCollective
from shardserve.agent.lifetime import GenerationEnded, Lifetime

# torch's stubs know neither the store nor what a group is made of.
dist: Any = torch.distributed

REDUCE = {
    "sum": dist.ReduceOp.SUM,
    # gloo has no average, and NCCL's divides each part first, which rounds otherwise.
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


class TorchGroupCollective(GroupCollective):
    """group: one that stands. memory: the device whose tensors it takes; others are copied there and back. wider: what
    it can't reduce, as a dtype that gives the same result.
    """

    def __init__(
        self,
        library: str,
        group: Any,
        rank: int,
        size: int,
        memory: torch.device,
        wider: Mapping[torch.dtype, torch.dtype],
        lifetime: Lifetime,
    ) -> None:
        self.rank = rank
        self.size = size
        self._library = library
        self._group = group
        self._memory = memory
        self._wider = wider
        self._lifetime = lifetime

    @abstractmethod
    def _run(self, issue: Callable[[], Any]) -> None:
        """Has the group do what `issue` gives the work of; it is done as far as the next operator can tell."""

    def _broken(self, error: Exception) -> Exception:
        return broken(self._library, "failed", error, self._lifetime)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if op in ("max", "min") and x.is_floating_point():
            # Of NaN gloo keeps the first rank's alone, and NCCL promises nothing.
            parts = self.all_gather(x[None])
            return parts.amax(0) if op == "max" else parts.amin(0)
        out = x.to(device=self._memory, dtype=self._wider.get(x.dtype, x.dtype), copy=True)
        if out.numel():
            options = dist.AllreduceOptions()
            options.reduceOp = REDUCE[op]
            self._run(lambda: self._group.allreduce([out], options))
        if op == "avg":
            out = out.div_(self.size)
        return out.to(device=x.device, dtype=x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        mine = x.to(self._memory)
        out = mine.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if x.numel():
            self._run(lambda: self._group._allgather_base(as_bytes(out), as_bytes(mine)))
        return out.to(x.device)

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        rows = rows_of_a_part(x, self.size)
        return self.all_reduce(x, op)[self.rank * rows : (self.rank + 1) * rows]

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        check_splits(x, input_splits, self.size)
        mine = x.to(self._memory)
        out = mine.new_empty((sum(output_splits), *x.shape[1:]))
        if width := math.prod(x.shape[1:]) * x.element_size():
            sizes = [[count * width for count in splits] for splits in (output_splits, input_splits)]
            self._run(lambda: self._group.alltoall_base(as_bytes(out), as_bytes(mine), *sizes))
        return out.to(x.device)

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        out = x.to(self._memory, copy=True)
        if x.numel():
            self._run(lambda: self._group.broadcast(as_bytes(out), src))
        return out.to(x.device)


def as_bytes(x: Tensor) -> Tensor:
    """What is only passed on goes as bytes: neither library knows all dtypes."""
    return x.reshape(-1).view(torch.uint8)


def broken(library: str, what: str, error: Exception, lifetime: Lifetime) -> Exception:
    """What an error of the library ends in: after the generation's end it is no error."""
    return GenerationEnded() if lifetime.ended else CollectiveBroken(f"{library} {what}: {error}")
