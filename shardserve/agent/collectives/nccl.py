"""Collectives of ranks on CUDA devices: torch's NCCL process group, behind our interface. What NCCL sends is plaintext.

A collective is queued on the device, and the step goes on: only when the device's stream was waited for is it known
whether it was done. A wait of the device for a rank that is gone ends by `abort`, which the end of the generation
calls; what such a collective gives is garbage, so nothing is done with it before `finish` has looked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from shardserve.agent.collectives.errors import rows_of_a_part
from shardserve.agent.collectives.interfaces import interface_of
from shardserve.agent.collectives.leaving import LeaveInTime
from shardserve.agent.collectives.torch_group import REDUCE, TorchGroupCollective, broken, dist
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.settings import Settings

logger = logging.getLogger(__name__)

# torch's table of NCCL's dtypes hasn't this one; bools it takes for bytes, of which it makes a sum the maximum.
_WIDER = {torch.int16: torch.int32}


class NcclCollective(TorchGroupCollective):
    """group: a ProcessGroupNCCL whose communicator stands (`form_nccl`), or another that has its collectives."""

    def __init__(self, group: Any, rank: int, size: int, device: torch.device, lifetime: Lifetime) -> None:
        super().__init__("NCCL", group, rank, size, device, _WIDER, lifetime)
        self._last: Any = None

    def _run(self, issue: Callable[[], Any]) -> None:
        if self._lifetime.ended:
            raise GenerationEnded
        try:
            self._last = issue()
            # No wait of this thread: what the stream is given next waits for the collective.
            self._last.wait()
        except torch.AcceleratorError:
            # An operator before this one failed on the device: an error of the step.
            raise
        except RuntimeError as error:
            raise self._broken(error) from error

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        rows = rows_of_a_part(x, self.size)
        if x.dtype in self._wider or not x.numel() or op in ("max", "min"):
            return super().reduce_scatter(x, op)
        out = x.new_empty((rows, *x.shape[1:]))
        options = dist.ReduceScatterOptions()
        options.reduceOp = REDUCE[op]
        self._run(lambda: self._group._reduce_scatter_base(out, x, options))
        return out.div_(self.size) if op == "avg" else out

    def finish(self) -> None:
        """After the device's stream was waited for."""
        last, self._last = self._last, None
        if last is not None:
            try:
                # Asks the communicator what went wrong since, for all of its collectives; `wait` raises it.
                last.is_completed()
                last.wait()
            except RuntimeError as error:
                raise self._broken(error) from error
        if self._lifetime.ended:
            raise GenerationEnded


def form_nccl(
    store: Any, rank: int, size: int, host: str, device: torch.device, lifetime: Lifetime, settings: Settings
) -> NcclCollective:
    """Connects the ranks; each calls it with the same `store` (a torch.distributed.Store), and a device of its own.

    host: this rank's own address; NCCL connects on that interface unless NCCL_SOCKET_IFNAME says otherwise.
    CollectiveBroken, with NCCL's text, if they can't be connected. NCCL can't be told to stop trying: an agent that is
    blocked in it when the generation ends, ends itself.
    """
    name = interface_of(host)
    if name is not None:
        # "=": this one, not all whose names begin so.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    options = dist.ProcessGroupNCCL.Options()
    options.global_ranks_in_group = list(range(size))
    # How long torch waits for an abort, and when its watchdog logs a collective as too slow.
    options._timeout = timedelta(seconds=settings.step_timeout)
    leaving = LeaveInTime("NCCL", lifetime, settings.abort_timeout)
    try:
        with leaving:
            group = dist.ProcessGroupNCCL(store, rank, size, options)
            # At once: without it the first step would, and its failure be a failed step.
            group.eager_connect_single_device(device)
    except (RuntimeError, GenerationEnded) as error:
        raise broken("NCCL", "could not connect its ranks", error, lifetime) from error

    def abort() -> None:
        try:
            with leaving:
                group.abort()
        except RuntimeError as error:
            logger.warning("NCCL's abort failed: %s", error)

    lifetime.on_end(abort)
    if lifetime.ended:
        raise GenerationEnded
    return NcclCollective(group, rank, size, device, lifetime)
