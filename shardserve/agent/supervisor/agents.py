"""The agents of a host: forked, watched, and forked anew.

Deaths come from pidfds. A rank that dies more than `max_restarts` times in `restart_window`, or whose agent says that
it can never work, is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Protocol

from shardserve.agent.supervisor.absences import Absences
from shardserve.agent.supervisor.processes import AgentProcess, ForkServer
from shardserve.agent.supervisor.slots import AgentSlot
from shardserve.errors import CLASSES, ServableError, ShardserveError, StartError, from_wire
from shardserve.restarts import RestartBudget
from shardserve.settings import Settings


class Owner(Protocol):
    """The supervisor, as its agents need it."""

    @property
    def starting(self) -> bool:
        """Whether not all agents have been registered yet."""

    @property
    def leaving(self) -> bool:
        """Whether it ends, so that nothing is forked any more."""

    def log(self, level: int, text: str) -> None: ...

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs it in a task; an exception ends the supervisor."""

    def fail(self, error: ShardserveError) -> None:
        """Ends the supervisor."""

    def gave_up(self, rank: int, error: ShardserveError) -> None:
        """A rank is not forked again."""

    def has_said(self) -> None:
        """An agent has said something, as how far it has loaded its weights."""


class HostAgents:
    """slots: one for each rank of this host, none before the Worker has said which these are."""

    def __init__(self, settings: Settings, owner: Owner) -> None:
        self._settings = settings
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.slots: list[AgentSlot] = []
        self._absences = Absences(settings, self.kill)
        self._fork_server: ForkServer | None = None
        self._fork_server_restarts = RestartBudget(settings)
        # Before the first agents were there. Not within a window: each takes start_timeout, which may be as long.
        self._silent_fork_servers = 0
        self._all_dead = asyncio.Event()

    def start_fork_server(self) -> ForkServer:
        """To be called before agents are asked for: it imports torch meanwhile."""
        server = self._fork_server = ForkServer()
        self._loop.add_reader(server.pidfd, self._fork_server_died, server)
        return server

    async def fork_all(self, slots: list[AgentSlot]) -> None:
        self.slots = slots
        await asyncio.gather(*(self._fork(slot) for slot in slots))

    def fork_those_that_left(self) -> None:
        """For a Worker that has come after one that told agents, and not this supervisor, to leave."""
        for slot in self.slots:
            if slot.left:
                slot.left = False
                self._owner.spawn(partial(self._fork, slot))

    def lacked(self, ranks: Collection[int]) -> None:
        """Those of this host that the Worker says it lacks: they are killed if they don't come."""
        self._absences.told(ranks, self.slots)

    def forgive(self, rank: int) -> None:
        """Its last death doesn't count."""
        for slot in self.slots:
            if slot.request.rank == rank:
                slot.restarts.forgive()

    def kill(self, rank: int, pid: int, reason: str) -> None:
        for slot in self.slots:
            if slot.request.rank == rank and slot.process is not None and slot.process.pid == pid:
                self._owner.log(logging.WARNING, f"rank {rank} (pid {pid}) is killed: it {reason}")
                slot.process.kill()

    def read_all(self) -> None:
        """Takes in now what agents have said on their pipes, which the loop may not have come to yet."""
        for slot in self.slots:
            if slot.process is not None:
                self._says(slot, slot.process)

    async def leave(self) -> None:
        """Waits until agents that the Worker told to leave have left, at most exit_timeout."""
        if any(slot.process for slot in self.slots):
            try:
                await asyncio.wait_for(self._all_dead.wait(), self._settings.exit_timeout)
            except asyncio.TimeoutError:
                self._owner.log(
                    logging.WARNING, f"agents did not leave within {self._settings.exit_timeout} s and are killed"
                )

    def close(self) -> None:
        """Ends the fork server, and with it every agent that is left."""
        server, self._fork_server = self._fork_server, None
        if server is not None:
            self._loop.remove_reader(server.pidfd)
            server.close()
        self.lacked(())
        for slot in self.slots:
            if slot.process is not None:
                self._loop.remove_reader(slot.process.pidfd)
                self._loop.remove_reader(slot.process.words)
                slot.process.close()
        for memory in {slot.shared_memory for slot in self.slots if slot.shared_memory is not None}:
            os.close(memory)

    def _fork_server_died(self, server: ForkServer) -> None:
        """Its agents die with it; their pidfds say so, and the first that is forked anew starts the next one."""
        if self._fork_server is not server:
            return
        self._loop.remove_reader(server.pidfd)
        server.close()
        self._fork_server = None
        if self._owner.leaving:
            return
        if self._owner.starting and not server.has_forked:
            # Tried again: torch's files that a slow disk has read meanwhile are in the page cache for the next one.
            self._silent_fork_servers += server.was_silent
            if not server.was_silent or self._silent_fork_servers > self._settings.max_restarts:
                why = server.ending if server.was_silent else f"{server.ending}; its output says why"
                self._owner.fail(StartError(f"the fork server (pid {server.pid}) could not start: it {why}"))
                return
        elif not self._fork_server_restarts.spend():
            self._owner.fail(StartError(f"the fork server died {self._fork_server_restarts}"))
            return
        self._owner.log(logging.ERROR, f"the fork server (pid {server.pid}) {server.ending}; starting another")

    async def _fork(self, slot: AgentSlot) -> None:
        while not self._owner.leaving:
            try:
                server = self._fork_server or self.start_fork_server()
                process = await server.fork(slot.request, slot.shared_memory, self._settings.start_timeout)
                break
            except ConnectionError:
                self._fork_server_died(server)
            except (StartError, OSError) as error:
                self._restart(slot, str(error))
                return
        else:
            return
        slot.process = process
        self._loop.add_reader(process.pidfd, self._died, slot, process)
        self._loop.add_reader(process.words, self._says, slot, process)
        self._absences.watch(slot)
        if self._owner.leaving:
            process.kill()

    def _says(self, slot: AgentSlot, process: AgentProcess) -> None:
        """How far an agent's loading is, or its last words, which are wanted when it has ended."""
        if not process.read():
            self._loop.remove_reader(process.words)
        self._absences.watch(slot)
        self._owner.has_said()

    def _died(self, slot: AgentSlot, process: AgentProcess) -> None:
        self._loop.remove_reader(process.pidfd)
        self._loop.remove_reader(process.words)
        words = process.read_last_words()
        process.close()
        slot.process = None
        self._absences.watch(slot)
        if self._owner.leaving:
            if not any(other.process for other in self.slots):
                self._all_dead.set()
            return
        if words is not None and not words.error:
            # It left in order: the Worker told it to, and is telling this supervisor the same, if that is connected.
            slot.left = True
            return
        if words is not None and issubclass(CLASSES.get(words.error, ShardserveError), ServableError):
            self._give_up(slot, from_wire(words.error, words.message))
            return
        if words is not None:
            self._restart(slot, words.message.removeprefix(f"rank {slot.request.rank}: "))
            return
        # Counted before anything is waited for: the Worker, too, has seen it, and may forgive it meanwhile.
        slot.restarts.spend()
        self._owner.spawn(lambda: self._mourn(slot, process.pid))

    async def _mourn(self, slot: AgentSlot, pid: int) -> None:
        """Forks a rank anew whose agent said no last words."""
        ending = "died"
        if self._fork_server is not None:
            # One that has ended, too, is replaced when it is asked for the next agent.
            with contextlib.suppress(OSError):
                ending = await self._fork_server.ending_of(pid, self._settings.start_timeout)
        if not self._owner.leaving:
            self._fork_anew(slot, f"pid {pid} {ending}")

    def _restart(self, slot: AgentSlot, reason: str) -> None:
        slot.restarts.spend()
        self._fork_anew(slot, reason)

    def _fork_anew(self, slot: AgentSlot, reason: str) -> None:
        """After a death that has been counted."""
        rank = slot.request.rank
        if slot.restarts.spent:
            self._give_up(slot, StartError(f"rank {rank}: died {slot.restarts}; the last time: {reason}"))
            return
        self._owner.log(logging.WARNING, f"rank {rank} is forked anew: {reason}")
        self._loop.call_later(slot.restarts.pause, self._owner.spawn, lambda: self._fork(slot))

    def _give_up(self, slot: AgentSlot, error: ShardserveError) -> None:
        slot.given_up = str(error)
        self._owner.gave_up(slot.request.rank, error)
