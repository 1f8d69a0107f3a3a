"""The supervisor: what `startup_agents` runs on a host. Follows the Worker, and has this host's agents (`HostAgents`).

It runs in an asyncio loop on a thread of the user's process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from shardserve.agent.supervisor.agents import HostAgents
from shardserve.agent.supervisor.connecting import Connector
from shardserve.agent.supervisor.slots import MEGABYTE, HostOptions, LoadedWeights, plan_slots
from shardserve.errors import (
    ConfigError,
    InternalError,
    JoinRefused,
    ShardserveError,
    StartError,
    Unavailable,
    from_wire,
)
from shardserve.log import servable_in_words
from shardserve.progress import Progress, agents_waited_for, quietly, remind
from shardserve.settings import Settings
from shardserve.wire.frames import FrameError, Payload
from shardserve.wire.messages import group
from shardserve.wire.security import Admission, Security
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
        self._agents = HostAgents(settings, self)
        # Whether the Worker has said anything on the connection that stands, or stood last.
        self._spoken = False
        # Whether the log has that the Worker is gone, and it has said nothing since.
        self._missed = False
        self._stream: FrameStream[group.ToSupervisor] | None = None
        self._stopping = threading.Event()
        self._connector = Connector(self._address, settings, options.security.local_only, self._stopping)
        self._ended = asyncio.Event()
        self._told = False
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
            self._agents.start_fork_server()
            self.spawn(lambda: self._join(None))
            await self._ended.wait()
        except Exception as error:
            logger.debug("the supervisor ends", exc_info=error)
            self.fail(_named(error))
        finally:
            self._stopping.set()
            if self._told:
                await self._agents.leave()
            if self._stream is not None:
                self._stream.close()
            self._agents.close()

    def stop(self) -> None:
        """Ends the agents and `run`; for other threads: through `call_soon_threadsafe`."""
        self._stopping.set()
        self._report(Unavailable("stopped before all agents were registered"))
        self._ended.set()

    @property
    def starting(self) -> bool:
        """Whether not all agents have been registered yet."""
        return self._ready is not None

    @property
    def leaving(self) -> bool:
        """Whether it ends, so that nothing is forked any more."""
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
            self.log(logging.ERROR, str(error))

    def log(self, level: int, text: str) -> None:
        logger.log(level, "%s", self._with_servable(text))

    def _with_servable(self, text: str) -> str:
        return f"{self._servable}: {text}" if self._servable else text

    def fail(self, error: ShardserveError) -> None:
        """Ends this supervisor, and tells the Worker that none of its ranks will come back."""
        if self._stream is not None:
            for slot in self._agents.slots:
                self._stream.send(group.GaveUp(slot.request.rank, str(error)))
        # Whoever still waits for the agents is told, and may go on without them.
        if self._ready is None and not self._stopping.is_set():
            self.failure = error
        self._report(error)
        self._ended.set()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs it in a task; an exception ends this supervisor."""

        async def guarded() -> None:
            try:
                await work()
            except Exception as error:
                logger.debug("the supervisor ends", exc_info=error)
                self.fail(_named(error))

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, seconds: float | None) -> None:
        """Connects and introduces itself; None waits for ever, as long as nobody stops it."""
        connected = await self._connector.connect(float("inf") if seconds is None else seconds)
        if self.leaving:
            # stop() doesn't wait for a connection attempt to time out, so this one may have come through afterwards.
            if connected is not None:
                connected.close()
            return
        if connected is None:
            silence = f"no Worker at {self._address} for {seconds} s (reconnect_timeout)"
            self.fail(StartError(silence + self._connector.hindrance))
            return
        stream: FrameStream[group.ToSupervisor] = FrameStream(
            group.ToSupervisor,
            self._frame,
            self._lost,
            admission=Admission(
                Security.load(self._options.security), "Worker", self._settings.join_timeout, self._address
            ),
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
        self._agents.lacked(())
        if isinstance(reason, JoinRefused):
            self.fail(reason)
        elif not self.leaving:
            gone = f"the Worker at {self._address} is gone{f' ({reason})' if reason else ''}"
            # With the server in the same process, the launcher logs the Worker's end and the reason.
            level = logging.INFO if self._missed or self._options.with_server else logging.WARNING
            self._missed = True
            self.log(level, f"{gone}; waiting for it to come back")
            # A Worker that ends connections without a word may do so for ever: not at once again.
            pause = 0.0 if self._spoken else self._settings.connect_retry_interval
            self._loop.call_later(pause, self.spawn, lambda: self._join(self._settings.reconnect_timeout))

    def _frame(self, message: group.ToSupervisor, payload: Payload) -> None:
        self._spoken = True
        self._missed = False
        match message:
            case group.Roster(hosts=hosts):
                self._enlist(hosts)
            case group.Enlisted():
                self.spawn(lambda: self._enlisted(message))
            case group.HostWaits(missing=missing):
                self._agents.lacked(missing)
                self._waits(len(self._agents.slots) or len(missing), missing)
            case group.HostReady():
                self._agents.lacked(())
                self._waits(len(self._agents.slots), ())
                # Agents say that they have loaded before they register, but on their pipes, which may be read later
                # than this message.
                self._agents.read_all()
                self._report(None)
            case group.Kill(rank=rank, pid=pid, reason=reason):
                self._agents.kill(rank, pid, reason)
            case group.Forgive(rank=rank):
                self._agents.forgive(rank)
            case group.Refuse(error=error, message=text):
                self.fail(from_wire(error, text))
            case group.Exit():
                self._told = True
                self._stopping.set()
                self._report(Unavailable("the servable was stopped"))
                self._ended.set()
            case _:
                raise FrameError(f"{type(message).__name__} came out of turn")

    def has_said(self) -> None:
        """An agent has said something: tells `progress` how far all of them have loaded."""
        if self._ready is None:
            return
        slots = self._agents.slots
        known = [slot.process.loading for slot in slots if slot.process and slot.process.loading]
        done, total = sum(each.done for each in known), sum(each.total for each in known)
        if done < total or len(known) < len(slots):
            self._progress("loading weights, MB", done // MEGABYTE, total // MEGABYTE)
        else:
            self._loaded = LoadedWeights(total, self._loop.time() - self._forked_at)

    def gave_up(self, rank: int, error: ShardserveError) -> None:
        """A rank is not forked again: tells the Worker. Ends this supervisor where nothing can go on without it."""
        if self._stream is not None:
            self._stream.send(group.GaveUp(rank, str(error)))
        if self.starting or self._options.vital:
            self.fail(error)
        else:
            self.log(logging.ERROR, f"rank {rank} is not forked again: {str(error).removeprefix(f'rank {rank}: ')}")

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
        if self._agents.slots:
            known = tuple(slot.request.rank for slot in self._agents.slots)
            if known != message.ranks:
                raise ConfigError(f"the Worker that came back gives this host rank {message.ranks}, it had {known}")
            # A Worker that was respawned doesn't know.
            for slot in self._agents.slots:
                if slot.given_up is not None and self._stream is not None:
                    self._stream.send(group.GaveUp(slot.request.rank, slot.given_up))
            self._agents.fork_those_that_left()
            return
        slots = plan_slots(self._options, message, self._name, self._settings)
        self._forked_at = self._loop.time()
        await self._agents.fork_all(slots)


def _named(error: Exception) -> ShardserveError:
    """What a user is told of it; what nobody foresaw is a bug, whose traceback goes to the log."""
    if isinstance(error, ShardserveError):
        return error
    logger.error("the supervisor can't go on", exc_info=error)
    return InternalError(f"the supervisor can't go on: {type(error).__name__}: {error}")
