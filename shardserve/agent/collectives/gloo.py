"""Collectives of ranks on several CPU hosts: torch's gloo process group, behind our interface.

gloo can't be told to stop waiting: a rank that is blocked here when its generation ends doesn't leave in abort_timeout
and is killed and forked anew. What gloo sends is plaintext.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from shardserve.agent.collectives.leaving import LeaveInTime
from shardserve.agent.collectives.torch_group import TorchGroupCollective, broken, dist
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.settings import Settings

# Of bools, a sum is "any".
_WIDER = {torch.bool: torch.uint8, torch.int16: torch.int32}


class GlooCollective(TorchGroupCollective):
    """store: a torch.distributed.Store. host: this rank's own address; gloo listens there, on ephemeral ports.

    Tensors on a device go through the CPU's memory.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        host: str,
        lifetime: Lifetime,
        settings: Settings,
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        options._timeout = timedelta(seconds=settings.form_timeout)
        self._leaving = LeaveInTime("gloo", lifetime, settings.abort_timeout)
        try:
            with self._leaving:
                group = dist.ProcessGroupGloo(store, rank, size, options)
        except (RuntimeError, GenerationEnded) as error:
            raise broken("gloo", "could not connect its ranks", error, lifetime) from error
        group._set_default_timeout(timedelta(seconds=settings.step_timeout))
        super().__init__("gloo", group, rank, size, torch.device("cpu"), _WIDER, lifetime)

    def _run(self, issue: Callable[[], Any]) -> None:
        try:
            with self._leaving:
                issue().wait()
        except RuntimeError as error:
            raise self._broken(error) from error
