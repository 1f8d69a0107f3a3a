"""Collectives of ranks on several CPU hosts: torch's gloo process group, behind our interface.

gloo can't be told to stop waiting: a rank that is blocked here when its generation ends doesn't leave in abort_timeout
and is killed and forked anew. What gloo sends is plaintext.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shardserve.agent.collectives.errors import CollectiveBroken, check_splits, rows_of_a_part
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.settings import Settings

logger = logging.getLogger(__name__)

# torch's stubs know neither the store nor what a gloo group is made of.
dist: Any = torch.distributed

_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    # gloo has no average.
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}

# What gloo can't reduce, as something that gives the same result. Of bools, a sum is "any".
_WIDER = {torch.bool: torch.uint8, torch.int16: torch.int32}


class GlooCollective:
    """store: a torch.distributed.Store. host: this rank's own address; gloo listens there, on ephemeral ports."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        host: str,
        lifetime: Lifetime,
        settings: Settings,
    ) -> None:
        self.rank = rank
        self.size = size
        self._lifetime = lifetime
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        options._timeout = timedelta(seconds=settings.form_timeout)
        self._abort_timeout = settings.abort_timeout
        self._blocked = True
        lifetime.on_end(self._leave_in_time)
        try:
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        except (RuntimeError, GenerationEnded) as error:
            raise self._broken("could not connect its ranks", error) from error
        finally:
            self._blocked = False
        self._group._set_default_timeout(timedelta(seconds=settings.step_timeout))

    def _leave_in_time(self) -> None:
        """Nothing else ends a wait inside gloo, and the Worker that would have this agent killed may be unreachable."""

        def check() -> None:
            if self._blocked:
                logger.warning("an agent ends: it is blocked in gloo after the end of its generation")
                os._exit(1)

        timer = threading.Timer(self._abort_timeout, check)
        timer.daemon = True
        timer.start()

    def _broken(self, what: str, error: Exception) -> Exception:
        return GenerationEnded() if self._lifetime.ended else CollectiveBroken(f"gloo {what}: {error}")

    def _wait(self, work: Any) -> None:
        self._blocked = True
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken("failed", error) from error
        finally:
            self._blocked = False

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        out = x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x.clone()
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE[op]
        self._wait(self._group.allreduce([out], options))
        if op == "avg":
            out = out.div_(self.size)
        return out.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.allgather([[_bytes(part) for part in parts]], [_bytes(x)]))
        return torch.cat(parts)

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        rows = rows_of_a_part(x, self.size)
        return self.all_reduce(x, op)[self.rank * rows : (self.rank + 1) * rows]

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        check_splits(x, input_splits, self.size)
        out = x.new_empty((sum(output_splits), *x.shape[1:]))
        if width := math.prod(x.shape[1:]) * x.element_size():
            sizes = [[count * width for count in splits] for splits in (output_splits, input_splits)]
            self._wait(self._group.alltoall_base(_bytes(out), _bytes(x), *sizes))
        return out

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        out = x.clone()
        self._wait(self._group.broadcast(_bytes(out), src))
        return out


def _bytes(x: Tensor) -> Tensor:
    """What is only passed on goes as bytes: gloo doesn't know all dtypes."""
    return x.reshape(-1).view(torch.uint8)
