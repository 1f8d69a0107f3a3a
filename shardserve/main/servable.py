"""One servable version as Main sees it: the connection to its Worker and the requests that wait for an answer.

A request stays here until it is answered, its deadline passes or its client leaves. When the Worker ends, the requests
are submitted again, under new numbers, as soon as its successor announces itself; the launcher owns the Worker's
listener, so a connection made in between waits in the backlog.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardserve.errors import (
    Aborted,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ShardserveError,
    StartError,
    Unavailable,
    from_wire,
)
from shardserve.main.timeline import WorkerInquiries
from shardserve.settings import Settings
from shardserve.wire.frames import Buffer, FrameError, NoMemory, Payload, split
from shardserve.wire.messages import front
from shardserve.wire.process import spare_descriptors
from shardserve.wire.sockets import same_user
from shardserve.wire.stream import FrameStream
from shardserve.wire.stubs import shardserve_pb2 as pb

logger = logging.getLogger(__name__)

Result = tuple[front.Instance, list[Payload]] | ShardserveError
"""Outputs of one instance and their bytes, in the order of the keys; or why there are none."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request without an answer. number: what the living Worker knows it by, 0 if it doesn't."""

    method: str
    instances: list[front.Instance]
    buffers: list[Buffer]
    nbytes: int
    deadline: float | None
    answer: asyncio.Future[list[Result]]
    since: float
    places: tuple[int, ...] | None
    number: int = 0
    submissions: int = 0
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Counters:
    resubmitted: int = 0
    ignored_answers: int = 0


@dataclass(slots=True, eq=False)
class ServableVersion:
    """A servable version; `changed` is called whenever what `state` or `announce` say may be different."""

    name: str
    version: int
    settings: Settings
    changed: Callable[[], None]
    announce: front.Announce | None = None
    counters: Counters = field(default_factory=Counters)
    waiting_bytes: int = 0
    _address: str = ""
    _stream: FrameStream[front.ToMain] | None = None
    _announced: bool = False
    _was_ready: bool = False
    _gone: bool = False
    _waiting: dict[_Waiting, None] = field(default_factory=dict)
    _submitted: dict[int, _Waiting] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _inquiries: WorkerInquiries = field(default_factory=WorkerInquiries)

    def __str__(self) -> str:
        return f"servable {self.name!r} version {self.version}"

    @property
    def was_ready(self) -> bool:
        return self._was_ready

    @property
    def waiting(self) -> list[asyncio.Future[list[Result]]]:
        return [waiting.answer for waiting in self._waiting]

    @property
    def state(self) -> front.ServableState:
        """As in `Announce`; without a Worker recovering, if it was ready once, or starting."""
        if self._gone:
            return "stopping"
        if self._announced and self.announce is not None:
            return self.announce.state
        return "recovering" if self._was_ready else "starting"

    @property
    def reason(self) -> str:
        if self._gone:
            return "its Worker was stopped"
        if not self._announced:
            return "waiting for its Worker to start"
        return self.announce.reason if self.announce is not None else ""

    # Requests

    def check_available(self) -> front.Announce:
        """What the Worker announced; Unavailable if a request can't even wait."""
        state = self.state
        if state == "starting" or self.announce is None:
            raise Unavailable(f"{self} is not available yet: {self.reason or state}")
        if state in ("stopping", "failed"):
            raise Unavailable(f"{self} is {state}: {self.reason}" if self.reason else f"{self} is {state}")
        return self.announce

    async def infer(
        self,
        method: str,
        instances: list[front.Instance],
        buffers: list[Buffer],
        deadline: float | None,
        places: tuple[int, ...] | None = None,
    ) -> list[Result]:
        """One result per instance. deadline: a reading of time.monotonic(). places: as in front.Infer.

        Cancelling the call tells the Worker that the answer isn't needed.
        """
        waiting = self._admit(method, instances, buffers, deadline, places)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._withdraw(waiting)
            raise

    async def timeline(self, timeout: float) -> pb.ServableTimeline:
        """What its Worker and agents tell within `timeout` seconds; Unavailable if there is no Worker now."""
        if self._stream is None or not self._announced:
            raise Unavailable(f"{self} has no Worker now: {self.reason}")
        reply = pb.ServableTimeline(name=self.name, version=self.version)
        return await self._inquiries.ask(self._stream.send, reply, str(self), timeout)

    def fail_all(self, error: ShardserveError) -> None:
        """Answers whatever waits with `error`."""
        for waiting in list(self._waiting):
            self._withdraw(waiting)
            self._answer(waiting, error)

    def _admit(
        self,
        method: str,
        instances: list[front.Instance],
        buffers: list[Buffer],
        deadline: float | None,
        places: tuple[int, ...] | None,
    ) -> _Waiting:
        settings = self.settings
        nbytes = sum(map(len, buffers))
        if len(self._waiting) >= settings.max_requests:
            raise Overloaded(
                f"{self}: {len(self._waiting)} requests wait for an answer already, at most {settings.max_requests} "
                "at once (max_requests)"
            )
        if self._waiting and self.waiting_bytes + nbytes > settings.max_request_bytes:
            raise Overloaded(
                f"{self}: requests of {self.waiting_bytes} bytes wait for an answer already, this one has {nbytes}; "
                f"at most {settings.max_request_bytes} at once (max_request_bytes)"
            )
        if self._stream is not None and self._stream.unsent > settings.max_unsent_bytes:
            raise Overloaded(
                f"{self}: its Worker has yet to take {self._stream.unsent} bytes, at most {settings.max_unsent_bytes} "
                "(max_unsent_bytes)"
            )
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        waiting = _Waiting(method, instances, buffers, nbytes, deadline, loop.create_future(), now, places)
        if deadline is not None:
            left = deadline - now
            waiting.timer = loop.call_later(left - min(settings.deadline_margin, left / 10), self._expire, waiting)
        self._waiting[waiting] = None
        self.waiting_bytes += nbytes
        if self._announced:
            self._submit(waiting)
        return waiting

    def _submit(self, waiting: _Waiting) -> None:
        assert self._stream is not None
        waiting.number = next(self._numbers)
        waiting.submissions += 1
        self._submitted[waiting.number] = waiting
        infer = front.Infer(waiting.number, waiting.method, waiting.instances, waiting.deadline, waiting.places)
        try:
            self._stream.send(infer, waiting.buffers)
        except ShardserveError as error:
            self._answer(waiting, error)
        except Exception:
            # If it were kept, it would be sent to every Worker that is respawned, and fail each connection in turn.
            logger.exception("%s: a request could not be sent to its Worker", self)
            self._answer(waiting, InternalError("a bug in the server; its log has the traceback"))

    def _release(self, waiting: _Waiting) -> None:
        if self._waiting.pop(waiting, waiting) is None:
            self.waiting_bytes -= waiting.nbytes
        self._submitted.pop(waiting.number, None)
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _withdraw(self, waiting: _Waiting) -> None:
        if waiting.number in self._submitted and self._stream is not None:
            self._stream.send(front.Cancel(waiting.number))
        self._release(waiting)

    def _answer(self, waiting: _Waiting, outcome: list[Result] | ShardserveError) -> None:
        self._release(waiting)
        if waiting.answer.done():  # Cancelled; its caller hasn't run yet.
            return
        if isinstance(outcome, ShardserveError):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)

    def _expire(self, waiting: _Waiting) -> None:
        what = "to answer" if waiting.number else "to have a Worker again"
        passed = time.monotonic() - waiting.since
        error = DeadlineExceeded(
            f"waited {passed:.3f} s for {self} {what} (method {waiting.method!r}, servable {self.state})"
        )
        self._withdraw(waiting)
        self._answer(waiting, error)

    # The connection to the Worker

    async def attach(self, address: str) -> None:
        """Connects to the Worker's listener at an abstract Unix address, and again whenever the connection ends."""
        if self._stream is not None and address == self._address:
            return
        if self._stream is not None:
            old, self._stream = self._stream, None
            old.abort()
            self._disconnected()
        self._address = address
        self._gone = False
        try:
            await self._connect()
        except OSError as error:
            raise StartError(f"{self}: no Worker listens at @{address}: {error}") from error

    def close(self) -> None:
        """Leaves the Worker for good."""
        self._gone = True
        if self._stream is not None:
            old, self._stream = self._stream, None
            old.close()

    async def _connect(self) -> None:
        with spare_descriptors():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect("\0" + self._address)  # Never waits: connected, in the backlog, or an error.
            if not same_user(sock):
                raise StartError(f"{self}: @{self._address} belongs to another user")
            stream: FrameStream[front.ToMain] = FrameStream(
                front.ToMain,
                self._on_frame,
                lambda reason: self._on_lost(stream, reason),
                share=True,
                on_no_memory=self._on_no_memory,
            )
            self._stream = stream
            await asyncio.get_running_loop().create_unix_connection(lambda: stream, sock=sock)
        except BaseException:
            self._stream = None
            sock.close()
            raise

    async def _reconnect(self) -> None:
        try:
            await self._connect()
        except (ConnectionRefusedError, StartError) as error:
            logger.error("%s: its Worker's socket is gone: %s", self, error)
            self._gone = True
            self.fail_all(Unavailable(f"{self} was stopped"))
            self.changed()
        except OSError:  # The backlog is full, or this host is short of something.
            self._reconnect_later()

    def _reconnect_later(self) -> None:
        asyncio.get_running_loop().call_later(self.settings.reconnect_delay, self._reconnect_now)

    def _reconnect_now(self) -> None:
        if self._stream is None and not self._gone:
            task = asyncio.get_running_loop().create_task(self._reconnect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _on_lost(self, stream: FrameStream[front.ToMain], reason: Exception | None) -> None:
        if stream is not self._stream:
            return
        self._stream = None
        logger.warning("%s: the connection to its Worker ended%s", self, f": {reason}" if reason else "")
        spoke = self._announced
        self._disconnected()
        if spoke:
            self._reconnect_now()
        else:
            self._reconnect_later()

    def _disconnected(self) -> None:
        self._announced = False
        self._submitted.clear()
        self._inquiries.fail(Unavailable(f"{self}: its Worker ended while it told what it recorded"))
        for waiting in list(self._waiting):
            waiting.number = 0
            if waiting.submissions >= self.settings.max_submissions:
                self._answer(
                    waiting, Aborted(f"{waiting.submissions} Workers of {self} ended while they had this request")
                )
        self.changed()

    def _on_frame(self, message: front.ToMain, payload: Payload) -> None:
        match message:
            case front.Reply():
                self._on_reply(message, payload)
            case front.Failed():
                if (waiting := self._expected(message.request)) is not None:
                    self._answer(waiting, from_wire(message.error, message.message))
            case front.Announce():
                self._on_announce(message)
            case front.ReplicaTimeline() | front.RankTimeline() | front.TimelineEnd():
                self._inquiries.take(message)

    def _on_no_memory(self, message: front.ToMain, error: NoMemory) -> None:
        if not isinstance(message, front.Reply):
            raise error
        if (waiting := self._expected(message.request)) is not None:
            self._answer(waiting, Overloaded(f"the server has {error} of the answer"))

    def _on_announce(self, message: front.Announce) -> None:
        if (message.name, message.version) != (self.name, self.version):
            raise FrameError(f"the Worker of {message.name!r} version {message.version} is at the address of {self}")
        self.announce = message
        self._was_ready = self._was_ready or message.state == "ready"
        if not self._announced:
            self._announced = True
            for waiting in list(self._waiting):
                self.counters.resubmitted += waiting.submissions > 0
                self._submit(waiting)
        self.changed()

    def _expected(self, number: int) -> _Waiting | None:
        waiting = self._submitted.get(number)
        if waiting is None:
            self.counters.ignored_answers += 1
        return waiting

    def _on_reply(self, message: front.Reply, payload: Payload) -> None:
        results: list[Result] = []
        outputs = [result.outputs for result in message.results if isinstance(result, front.InstanceOutputs)]
        parts = iter(split(payload, [meta.nbytes for metas in outputs for meta in metas.values()]))
        waiting = self._expected(message.request)
        if waiting is None:
            return
        for result in message.results:
            if isinstance(result, front.InstanceOutputs):
                results.append((result.outputs, list(itertools.islice(parts, len(result.outputs)))))
            else:
                results.append(from_wire(result.error, result.message))
        if len(results) != len(waiting.instances):
            wrong = InternalError(f"{self} gave {len(results)} results for {len(waiting.instances)} instances")
            self._answer(waiting, wrong)
        else:
            self._answer(waiting, results)
