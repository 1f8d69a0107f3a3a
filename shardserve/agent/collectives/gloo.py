"""Collectives of ranks on several CPU hosts: torch's gloo process group, behind our interface.

gloo can't be told to stop waiting: a rank that is blocked here when its generation ends doesn't leave in abort_timeout
and is killed and forked anew. What gloo sends is plaintext.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shardserve.agent.collectives.errors import CollectiveBroken
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
        # gloo has no bool: 0 and 1 as bytes give the same result for every operation but sum, which is "any".
        out = x.to(torch.uint8) if x.dtype == torch.bool else x.clone()
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE[op]
        self._wait(self._group.allreduce([out], options))
        if op == "avg":
            out = out.div_(self.size)
        return out.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [x]))
        return torch.cat(parts)

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        return self.all_reduce(x, op).chunk(self.size)[self.rank].contiguous()

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(output_splits), *x.shape[1:]))
        self._wait(self._group.alltoall_base(out, x, list(output_splits), list(input_splits)))
        return out

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        out = x.clone()
        self._wait(self._group.broadcast(out, src))
        return out
