"""The supervisor: what `startup_agents` runs on a host. Forks this host's agents, watches them, forks them anew.

It runs in an asyncio loop on a thread of the user's process. Deaths come from pidfds. A rank that dies more than
`max_restarts` times in `restart_window`, or whose agent says that it can never work, is given up, and the Worker told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from shardserve.agent.supervisor.absences import Absences
from shardserve.agent.supervisor.connecting import Connector
from shardserve.agent.supervisor.processes import AgentProcess, ForkServer
from shardserve.agent.supervisor.slots import MEGABYTE, AgentSlot, HostOptions, LoadedWeights, plan_slots
from shardserve.errors import (
    CLASSES,
    ConfigError,
    InternalError,
    JoinRefused,
    ServableError,
    ShardserveError,
    StartError,
    Unavailable,
    from_wire,
)
from shardserve.log import servable_in_words
from shardserve.progress import Progress, agents_waited_for, quietly, remind
from shardserve.restarts import RestartBudget
from shardserve.settings import Settings
from shardserve.wire.frames import FrameError, Payload
from shardserve.wire.messages import group
from shardserve.wire.security import Door, Security
from shardserve.wire.sockets import is_local, parse_address
from shardserve.wire.stream import FrameStream

logger = logging.getLogger(__name__)


class Supervisor:
    """`run` is its whole life; `ready` is done when all agents are registered, with what they have loaded if that is
    known, or with the error why not. `progress` hears until then of the agents that load and come."""

    needs_others = False
    failure: ShardserveError | None = None

    def __init__(
        self,
        options: HostOptions,
        settings: Settings,
        ready: Future[LoadedWeights | None],
        progress: Progress = quietly,
    ) -> None:
        self._options = options
        self._settings = settings
        self._ready: Future[LoadedWeights | None] | None = ready
        self._address = parse_address(options.distributed_address, "distributed_address")
        # By which the Worker knows this supervisor and its agents again.
        self._name = uuid.uuid4().hex
        self._slots: list[AgentSlot] = []
        self._absences = Absences(settings, self._kill)
        self._fork_server: ForkServer | None = None
        self._fork_server_restarts = RestartBudget(settings)
        # Before the first agents were there. Not within a window: each takes start_timeout, which may be as long.
        self._silent_fork_servers = 0
        # Whether the Worker has said anything on the connection that stands, or stood last.
        self._spoken = False
        # Whether the log has that the Worker is gone, and it has said nothing since.
        self._missed = False
        self._stream: FrameStream[group.ToSupervisor] | None = None
        self._stopping = threading.Event()
        self._connector = Connector(self._address, settings, options.security.local_only, self._stopping)
        self._ended = asyncio.Event()
        self._told = False
        self._all_dead = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        # What this host waits for, once the Worker has said it.
        self._waits_for = ""
        # As lines in the log name it, of which this process may have others; once the Worker has said it.
        self._servable = ""
        self._reminder: asyncio.Future[None] | None = None
        self._forked_at = 0.0
        self._loaded: LoadedWeights | None = None

    async def run(self) -> None:
        if not self._options.with_server:
            server = f"the server at {self._address}"
            notice = remind(
                self._settings.waiting_notice,
                lambda: self._with_servable(
                    f"this host waits for {self._waits_for or server + self._connector.hindrance}"
                ),
            )
            self._reminder = asyncio.ensure_future(notice)
        try:
            # First, since it imports torch meanwhile.
            self._start_fork_server()
            self._spawn(lambda: self._join(None))
            await self._ended.wait()
        except Exception as error:
            logger.debug("the supervisor ends", exc_info=error)
            self._fail(_named(error))
        finally:
            self._stopping.set()
            await self._end_agents()

    def stop(self) -> None:
        """Ends the agents and `run`; for other threads: through `call_soon_threadsafe`."""
        self._stopping.set()
        self._report(Unavailable("stopped before all agents were registered"))
        self._ended.set()

    @property
    def _leaving(self) -> bool:
        return self._stopping.is_set() or self._ended.is_set()

    def _report(self, error: Exception | None) -> None:
        if self._reminder is not None:
            self._reminder.cancel()
        if self._ready is not None:
            ready, self._ready = self._ready, None
            if error is None:
                ready.set_result(self._loaded)
            else:
                ready.set_exception(error)
        elif error is not None and not self._stopping.is_set():
            self._log(logging.ERROR, str(error))

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "%s", self._with_servable(text))

    def _with_servable(self, text: str) -> str:
        return f"{self._servable}: {text}" if self._servable else text

    def _fail(self, error: ShardserveError) -> None:
        """Ends this supervisor, and tells the Worker that none of its ranks will come back."""
        if self._stream is not None:
            for slot in self._slots:
                self._stream.send(group.GaveUp(slot.request.rank, str(error)))
        # Whoever still waits for the agents is told, and may go on without them.
        if self._ready is None and not self._stopping.is_set():
            self.failure = error
        self._report(error)
        self._ended.set()

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await work()
            except Exception as error:
                logger.debug("the supervisor ends", exc_info=error)
                self._fail(_named(error))

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The Worker's connection.

    async def _join(self, seconds: float | None) -> None:
        """Connects and introduces itself; None waits for ever, as long as nobody stops it."""
        connected = await self._connector.connect(float("inf") if seconds is None else seconds)
        if self._leaving:
            # Nobody has waited for a host that answers nothing.
            if connected is not None:
                connected.close()
            return
        if connected is None:
            silence = f"no Worker at {self._address} for {seconds} s (reconnect_timeout)"
            self._fail(StartError(silence + self._connector.hindrance))
            return
        stream: FrameStream[group.ToSupervisor] = FrameStream(
            group.ToSupervisor,
            self._frame,
            self._lost,
            door=Door(Security.load(self._options.security), "Worker", self._settings.join_timeout, self._address),
            on_admitted=self._admitted,
        )
        self._stream = stream
        self._spoken = False
        await self._loop.create_connection(lambda: stream, sock=connected)

    def _admitted(self) -> None:
        assert self._stream is not None
        self._stream.send(group.Introduce(os.getpid(), self._name))

    def _lost(self, reason: Exception | None) -> None:
        self._stream = None
        self._absences.told((), self._slots)
        if isinstance(reason, JoinRefused):
            self._fail(reason)
        elif not self._leaving:
            gone = f"the Worker at {self._address} is gone{f' ({reason})' if reason else ''}"
            # Whoever runs the server in this process knows of its Worker's end, and of the reason, already.
            level = logging.INFO if self._missed or self._options.with_server else logging.WARNING
            self._missed = True
            self._log(level, f"{gone}; waiting for it to come back")
            # One that ends connections without a word may do so for ever.
            pause = 0.0 if self._spoken else self._settings.connect_retry_interval
            self._loop.call_later(pause, self._spawn, lambda: self._join(self._settings.reconnect_timeout))

    def _frame(self, message: group.ToSupervisor, payload: Payload) -> None:
        self._spoken = True
        self._missed = False
        match message:
            case group.Roster(hosts=hosts):
                self._enlist(hosts)
            case group.Enlisted():
                self._spawn(lambda: self._enlisted(message))
            case group.HostWaits(missing=missing):
                self._absences.told(missing, self._slots)
                self._waits(len(self._slots) or len(missing), missing)
            case group.HostReady():
                self._absences.told((), self._slots)
                self._waits(len(self._slots), ())
                # They say so before they register, but on another way.
                for slot in self._slots:
                    if slot.process is not None:
                        self._says(slot, slot.process)
                self._report(None)
            case group.Kill(rank=rank, pid=pid, reason=reason):
                self._kill(rank, pid, reason)
            case group.Forgive(rank=rank):
                for slot in self._slots:
                    if slot.request.rank == rank:
                        slot.restarts.forgive()
            case group.Refuse(error=error, message=text):
                self._fail(from_wire(error, text))
            case group.Exit():
                self._told = True
                self._stopping.set()
                self._report(Unavailable("the servable was stopped"))
                self._ended.set()
            case _:
                raise FrameError(f"{type(message).__name__} came out of turn")

    def _waits(self, total: int, missing: tuple[int, ...]) -> None:
        if self._ready is not None:
            self._waits_for = agents_waited_for(total, missing)
            self._progress("loading agents", total - len(missing), total)

    def _enlist(self, hosts: tuple[str, ...]) -> None:
        options = self._options
        own = () if options.rank_start is not None else tuple(host for host in hosts if is_local(host))
        assert self._stream is not None
        self._stream.send(group.Enlist(own, options.agent_ip, options.rank_start, len(options.model_files or ())))

    async def _enlisted(self, message: group.Enlisted) -> None:
        self._servable = servable_in_words(message.servable, message.version)
        if self._slots:
            known = tuple(slot.request.rank for slot in self._slots)
            if known != message.ranks:
                raise ConfigError(f"the Worker that came back gives this host rank {message.ranks}, it had {known}")
            # A Worker that was respawned doesn't know.
            for slot in self._slots:
                if slot.given_up is not None and self._stream is not None:
                    self._stream.send(group.GaveUp(slot.request.rank, slot.given_up))
            return
        self._slots = plan_slots(self._options, message, self._name, self._settings)
        self._forked_at = self._loop.time()
        await asyncio.gather(*(self._fork(slot) for slot in self._slots))

    # The agents.

    def _start_fork_server(self) -> ForkServer:
        server = self._fork_server = ForkServer()
        self._loop.add_reader(server.pidfd, self._fork_server_died, server)
        return server

    def _fork_server_died(self, server: ForkServer) -> None:
        """Its agents die with it; their pidfds say so, and the first that is forked anew starts the next one."""
        if self._fork_server is not server:
            return
        self._loop.remove_reader(server.pidfd)
        server.close()
        self._fork_server = None
        if self._stopping.is_set():
            return
        if self._ready is not None and not server.has_forked:
            # The files of torch that a slow disk has read meanwhile, the next one finds in memory.
            self._silent_fork_servers += server.was_silent
            if not server.was_silent or self._silent_fork_servers > self._settings.max_restarts:
                why = server.ending if server.was_silent else f"{server.ending}; its output says why"
                self._fail(StartError(f"the fork server (pid {server.pid}) could not start: it {why}"))
                return
        elif not self._fork_server_restarts.spend():
            self._fail(StartError(f"the fork server died {self._fork_server_restarts}"))
            return
        self._log(logging.ERROR, f"the fork server (pid {server.pid}) {server.ending}; starting another")

    async def _fork(self, slot: AgentSlot) -> None:
        while not self._leaving:
            try:
                server = self._fork_server or self._start_fork_server()
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
        if self._stopping.is_set():
            process.kill()

    def _says(self, slot: AgentSlot, process: AgentProcess) -> None:
        """How far an agent's loading is, or its last words, which are wanted when it has ended."""
        if not process.read():
            self._loop.remove_reader(process.words)
        self._absences.watch(slot)
        if self._ready is None:
            return
        known = [slot.process.loading for slot in self._slots if slot.process and slot.process.loading]
        done, total = sum(each.done for each in known), sum(each.total for each in known)
        if done < total or len(known) < len(self._slots):
            self._progress("loading weights, MB", done // MEGABYTE, total // MEGABYTE)
        else:
            self._loaded = LoadedWeights(total, self._loop.time() - self._forked_at)

    def _died(self, slot: AgentSlot, process: AgentProcess) -> None:
        self._loop.remove_reader(process.pidfd)
        self._loop.remove_reader(process.words)
        words = process.read_last_words()
        process.close()
        slot.process = None
        self._absences.watch(slot)
        if self._leaving:
            if not any(other.process for other in self._slots):
                self._all_dead.set()
            return
        if words is not None and not words.error:
            # The Worker told it; the same order is on its way to this supervisor.
            return
        if words is not None and issubclass(CLASSES.get(words.error, ShardserveError), ServableError):
            self._give_up(slot, from_wire(words.error, words.message))
            return
        if words is not None:
            self._restart(slot, words.message.removeprefix(f"rank {slot.request.rank}: "))
            return
        # Counted before anything is waited for: the Worker, too, has seen it, and may forgive it meanwhile.
        slot.restarts.spend()
        self._spawn(lambda: self._mourn(slot, process.pid))

    async def _mourn(self, slot: AgentSlot, pid: int) -> None:
        """Forks a rank anew whose agent said no last words."""
        ending = "died"
        if self._fork_server is not None:
            # One that has ended, too, is replaced when it is asked for the next agent.
            with contextlib.suppress(OSError):
                ending = await self._fork_server.ending_of(pid, self._settings.start_timeout)
        if not self._leaving:
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
        self._log(logging.WARNING, f"rank {rank} is forked anew: {reason}")
        self._loop.call_later(slot.restarts.pause, self._spawn, lambda: self._fork(slot))

    def _give_up(self, slot: AgentSlot, error: ShardserveError) -> None:
        slot.given_up = str(error)
        if self._stream is not None:
            self._stream.send(group.GaveUp(slot.request.rank, str(error)))
        if self._ready is not None or self._options.vital:
            self._fail(error)
        else:
            rank = slot.request.rank
            self._log(logging.ERROR, f"rank {rank} is not forked again: {str(error).removeprefix(f'rank {rank}: ')}")

    def _kill(self, rank: int, pid: int, reason: str) -> None:
        for slot in self._slots:
            if slot.request.rank == rank and slot.process is not None and slot.process.pid == pid:
                self._log(logging.WARNING, f"rank {rank} (pid {pid}) is killed: it {reason}")
                slot.process.kill()

    async def _end_agents(self) -> None:
        """Agents that the Worker told to leave get exit_timeout; the fork server's end ends the rest."""
        if self._told and any(slot.process for slot in self._slots):
            try:
                await asyncio.wait_for(self._all_dead.wait(), self._settings.exit_timeout)
            except asyncio.TimeoutError:
                self._log(
                    logging.WARNING, f"agents did not leave within {self._settings.exit_timeout} s and are killed"
                )
        if self._stream is not None:
            self._stream.close()
        server, self._fork_server = self._fork_server, None
        if server is not None:
            self._loop.remove_reader(server.pidfd)
            server.close()
        self._absences.told((), self._slots)
        for slot in self._slots:
            if slot.process is not None:
                self._loop.remove_reader(slot.process.pidfd)
                self._loop.remove_reader(slot.process.words)
                slot.process.close()
        for memory in {slot.shared_memory for slot in self._slots if slot.shared_memory is not None}:
            os.close(memory)


def _named(error: Exception) -> ShardserveError:
    """What a user is told of it; what nobody foresaw is a bug, whose traceback goes to the log."""
    if isinstance(error, ShardserveError):
        return error
    logger.error("the supervisor can't go on", exc_info=error)
    return InternalError(f"the supervisor can't go on: {type(error).__name__}: {error}")
