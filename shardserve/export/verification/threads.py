"""A tensor-parallel group of threads in one process: for --verify and for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0, dtype=x.dtype),
    "avg": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
    "product": lambda x: x.prod(0, dtype=x.dtype),
}


class ThreadGroup:
    """`size` ranks, each used by its own thread; `abort` ends their waits with threading.BrokenBarrierError."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)

    def rank(self, rank: int) -> ThreadCollective:
        """The collective that thread `rank` uses."""
        return ThreadCollective(self, rank)

    def abort(self) -> None:
        self.barrier.abort()

    def run(self, work: Callable[[ThreadCollective], Result]) -> list[Result]:
        """`work` on every rank at once; the first rank's exception ends the others' waits and is raised."""
        failed: list[BaseException] = []

        def guarded(rank: int) -> Result:
            try:
                with torch.inference_mode():
                    return work(self.rank(rank))
            except BaseException as error:
                if not isinstance(error, threading.BrokenBarrierError):
                    failed.append(error)
                self.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
        if failed:
            raise failed[0]
        return [future.result() for future in futures]


class ThreadCollective:
    """One rank of a ThreadGroup; see shardserve.shards.collective.Collective."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = group.size
        self.given: list[tuple[tuple[int, ...], torch.dtype]] = []  # the shape and dtype of each collective's input

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.given.append((tuple(x.shape), x.dtype))
        self.group.slots[self.rank] = x
        self.group.barrier.wait()
        slots = [slot for slot in self.group.slots if slot is not None]
        self.group.barrier.wait()  # nobody writes its next tensor before all have read this one
        return slots

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return _REDUCE[op](torch.stack(self._exchange(x)))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x))

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        return self.all_reduce(x, op).chunk(self.size)[self.rank].clone()

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        sent = self._exchange_parts(torch.split(x, list(input_splits)))
        return torch.cat([parts[self.rank] for parts in sent])

    def _exchange_parts(self, parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        # Parts differ in length from rank to rank: pass them on one by one, in the same order everywhere.
        received = [self._exchange(part) for part in parts]
        return [[column[rank] for column in received] for rank in range(self.size)]

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return self._exchange(x)[src].clone()
