import asyncio
import dataclasses
import os
import subprocess
import time
from contextlib import contextmanager

import msgspec
import pytest
from asynchronous import asynchronous

from shardserve.agent.forking import ForkRequest, Loaded
from shardserve.agent.supervisor.absences import Absences
from shardserve.agent.supervisor.processes import AgentProcess
from shardserve.agent.supervisor.slots import AgentSlot
from shardserve.restarts import RestartBudget
from shardserve.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left")

LIMITS = Settings(load_timeout=1.0, step_timeout=0.5, abort_timeout=0.1)


@contextmanager
def living(settings):
    """A slot with a process, and the writing end of what that says."""
    reads, writes = os.pipe()
    with subprocess.Popen(["sleep", "60"]) as child:
        process = AgentProcess(child.pid, os.pidfd_open(child.pid), reads)
        slot = AgentSlot(ForkRequest(3, "", "cpu", "", 0, 1, (), ()), None, RestartBudget(settings), process)
        try:
            yield slot, writes
        finally:
            process.kill()
            process.close()
            os.close(writes)


class Kills:
    def __init__(self):
        self._said = asyncio.Queue()
        self.none = self._said.empty

    def __call__(self, *kill):
        self._said.put_nowait((*kill, time.monotonic()))

    async def next(self):
        return await self._said.get()


def says_that_it_has_loaded(slot, writes):
    os.write(writes, msgspec.json.encode(Loaded()) + b"\n")
    slot.process.read()


@asynchronous
async def test_one_that_loads_has_load_timeout_from_its_fork():
    kills = Kills()
    absences = Absences(LIMITS, kills)
    with living(LIMITS) as (slot, _):
        absences.told((3,), [slot])
        rank, pid, reason, at = await kills.next()
        assert (rank, pid, reason) == (3, slot.process.pid, "did not load its shard within load_timeout (1.0 s)")
        assert at - slot.process.forked_at > 1.09


@asynchronous
async def test_one_that_has_loaded_has_step_timeout_from_then():
    """However often the Worker says what it lacks."""
    kills = Kills()
    limits = dataclasses.replace(LIMITS, step_timeout=1.0)
    absences = Absences(limits, kills)
    with living(limits) as (slot, writes):
        absences.told((3, 4), [slot])
        says_that_it_has_loaded(slot, writes)
        absences.watch(slot)
        asyncio.get_running_loop().call_later(0.95, absences.told, (3,), [slot])
        rank, pid, reason, at = await kills.next()
        assert (rank, pid, reason) == (3, slot.process.pid, "did not come to the Worker within step_timeout (1.0 s)")
        assert 1.09 < at - slot.process.loaded_at < 2.0


@pytest.mark.parametrize("why", ["it came", "it has died"])
@asynchronous
async def test_nobody_is_killed_who_came_or_has_died(why):
    kills = Kills()
    absences = Absences(LIMITS, kills)
    with living(LIMITS) as (slot, writes), living(LIMITS) as (other, _):
        other = AgentSlot(ForkRequest(4, "", "cpu", "", 0, 1, (), ()), None, other.restarts, other.process)
        says_that_it_has_loaded(slot, writes)
        absences.told((3, 4), [slot, other])
        if why == "it came":
            absences.told((4,), [slot, other])
        else:
            process, slot.process = slot.process, None
            absences.watch(slot)
            slot.process = process
        # Whose time ends later.
        assert (await kills.next())[0] == 4
        assert kills.none()
