"""Agents that the Worker lacks: one that hangs never comes, and a Worker that is new does not know its pid."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

from shardserve.agent.supervisor.slots import AgentSlot
from shardserve.settings import Settings


class Absences:
    """`kill(rank, pid, reason)` is called for an agent that the Worker lacks: one that has loaded has step_timeout, as
    it may be in a step for so long; one that loads has load_timeout from its fork. Both have abort_timeout more, in
    which they may come, or end, by themselves. Where there is no Worker, nobody is lacked."""

    def __init__(self, settings: Settings, kill: Callable[[int, int, str], None]) -> None:
        self._settings = settings
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        # By rank, on CLOCK_MONOTONIC.
        self._since: dict[int, float] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def told(self, missing: Collection[int], slots: Sequence[AgentSlot]) -> None:
        """The ranks of this host that the Worker says it lacks."""
        now = time.monotonic()
        self._since = {rank: self._since.get(rank, now) for rank in missing}
        for slot in slots:
            self.watch(slot)

    def watch(self, slot: AgentSlot) -> None:
        """Whenever the slot has another process, or none, or its process has said something."""
        rank, process, settings = slot.request.rank, slot.process, self._settings
        if (timer := self._timers.pop(rank, None)) is not None:
            timer.cancel()
        if process is None or rank not in self._since:
            return
        if process.loaded_at is None:
            end = process.forked_at + settings.load_timeout
            reason = f"did not load its shard within load_timeout ({settings.load_timeout} s)"
        else:
            end = max(self._since[rank], process.loaded_at) + settings.step_timeout
            reason = f"did not come to the Worker within step_timeout ({settings.step_timeout} s)"
        left = end + settings.abort_timeout - time.monotonic()
        self._timers[rank] = self._loop.call_later(left, self._kill, rank, process.pid, reason)
