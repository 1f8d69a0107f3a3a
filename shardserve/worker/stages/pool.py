"""The pool of processes that run a servable's Python stages, and the calls that wait for one.

A call goes to the first process that is free, together with others of the same stage if its function takes a batch. A
process that dies, or hangs and is killed, fails its call; of several calls in it, each runs again alone, once, so that
only the one at fault fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from shardserve.errors import DeadlineExceeded, MessageTooLarge, Overloaded, ShardserveError, StageError, Unavailable
from shardserve.restarts import RestartBudget
from shardserve.servable import PythonStage, Servable
from shardserve.settings import Settings
from shardserve.wire.frames import FrameError
from shardserve.wire.messages import stages
from shardserve.worker.model_calls import ModelCalls
from shardserve.worker.sessions import Session
from shardserve.worker.stages.host import StageCall, StageHost

logger = logging.getLogger(__name__)


class StagePool:
    """`start` gives it its processes, whose first message is `load`. changed: called when it became ready. failed:
    called once with the reason, when a first start has failed, or too many later ones and no process is left: nothing
    will be answered then. first_start: false where a former Worker's processes have loaded the servable before."""

    def __init__(
        self,
        servable: Servable,
        load: stages.Load,
        size: int,
        models: ModelCalls,
        settings: Settings,
        changed: Callable[[], None],
        failed: Callable[[str], None],
        first_start: bool = True,
    ) -> None:
        self._servable = servable
        self._load = load
        self._size = size if servable.has_python_stages else 0
        self._models = models
        self._settings = settings
        self._changed = changed
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._hosts: list[StageHost] = []
        self._restarts = RestartBudget(settings)
        self._pause: asyncio.TimerHandle | None = None
        self._queue: OrderedDict[StageCall, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._was_ready = False
        self._first_start = first_start
        self._closed = ""

    @property
    def ready(self) -> bool:
        """Whether all processes have been ready once; those that are replaced since don't count."""
        return self._was_ready or not self._size

    @property
    def closed(self) -> bool:
        """Whether nothing is run any more."""
        return bool(self._closed)

    @property
    def pids(self) -> list[int]:
        return [host.pid for host in self._hosts]

    def start(self) -> None:
        """Starts the processes that are missing; in the pause after a start that failed, when it is over."""
        while len(self._hosts) < self._size and not self._closed and self._pause is None:
            try:
                host = StageHost(self, self._settings)
            except OSError as error:
                self._start_failed(f"a process can't be started: {error}")
                return
            self._hosts.append(host)
            task = self._loop.create_task(host.start(self._load))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self, reason: str) -> None:
        """Ends all processes, and answers all that wait, or come, with Unavailable."""
        self._closed = reason
        for host in self._hosts:
            for call in host.close():
                call.fail(Unavailable(reason))
        self._hosts.clear()
        for call in self._queue:
            call.fail(Unavailable(reason))
        self._queue.clear()

    async def run(
        self,
        method: str,
        number: int,
        stage: PythonStage,
        values: tuple[Any, ...],
        deadline: float | None,
        session: Session | None,
    ) -> tuple[Any, ...]:
        """One instance's outputs. StageError if the function failed on it, Overloaded or Unavailable otherwise."""
        if self._closed:
            raise Unavailable(self._closed)
        if len(self._queue) >= self._settings.queue_limit:
            raise Overloaded(f"{len(self._queue)} instances wait for a Python stage already (queue_limit)")
        call = StageCall(method, number, stage, values, deadline, session, self._loop.create_future())
        self._queue[call] = None
        # A call whose client has left must not hold memory, nor a place, until its turn.
        call.answer.add_done_callback(lambda _: self._queue.pop(call, None))
        self._pump()
        return await call.answer

    def _pump(self) -> None:
        for host in self._hosts:
            while host.state == "idle" and (calls := self._take()):
                host.run(calls)

    def _take(self) -> list[StageCall]:
        """The first call and those behind it that may share its run."""
        taken: list[StageCall] = []
        for call in self._queue:
            if _is_over(call):
                continue
            if not taken or _may_share(call, taken[0]):
                taken.append(call)
            if len(taken) == self._limit(taken[0]):
                break
        for call in taken:
            del self._queue[call]
        return taken

    def _limit(self, call: StageCall) -> int:
        if call.alone or call.session is not None or call.stage.batch_size is None:
            return 1
        return call.stage.batch_size or self._settings.stage_batch_limit

    # What hosts say.

    def loaded(self, host: StageHost) -> None:
        if not self._was_ready and all(other.state != "loading" for other in self._hosts):
            self._was_ready = True
            self._first_start = False
            self._changed()
        self._pump()

    def load_failed(self, host: StageHost, message: str) -> None:
        self._hosts.remove(host)
        self._start_failed(message)

    def _start_failed(self, reason: str) -> None:
        # Those that have loaded go on: what others lack (a process, memory, a file) may come back.
        living = any(host.state != "loading" for host in self._hosts)
        if self._first_start or not (self._restarts.spend() or living):
            self.close(f"Python stages can't run: {reason}")
            self._failed(self._closed)
            return
        logger.error("Python stages: %s; it is tried again", reason)
        if self._pause is None:
            self._pause = self._loop.call_later(self._restarts.pause, self._pause_over)

    def _pause_over(self) -> None:
        self._pause = None
        self.start()

    def finished(self, host: StageHost) -> None:
        self._pump()

    def died(self, host: StageHost, reason: str, calls: list[StageCall]) -> None:
        self._hosts.remove(host)
        if not (calls or host.killed or self._first_start):
            # By itself, as of a thread that its config has started: no call is to blame, so it is bounded like a start.
            self._start_failed(f"the process (pid {host.pid}) that ran nothing {reason}")
            return
        logger.error("the process of Python stages (pid %d) %s; another is started", host.pid, reason)
        if len(calls) == 1:
            calls[0].fail(StageError(f"{calls[0].where}: its process (pid {host.pid}) {reason}"))
        else:
            self._queue_alone(calls)
        self.start()
        self._pump()

    def too_large(self, error: MessageTooLarge, calls: list[StageCall]) -> None:
        """One run can't carry all of these calls; the host is idle again, and `_pump` goes on with it."""
        if len(calls) == 1:
            calls[0].fail(error)
        else:
            self._queue_alone(calls)

    def _queue_alone(self, calls: list[StageCall]) -> None:
        for call in reversed(calls):
            if not call.answer.done():
                call.alone = True
                self._queue[call] = None
                self._queue.move_to_end(call, last=False)

    async def call_model(
        self, message: stages.ModelCall, instances: list[tuple[Any, ...]], calls: Sequence[StageCall]
    ) -> list[tuple[Any, ...] | ShardserveError]:
        """For `Model.call`: one outcome per instance. It has as much time as the run's last deadline."""
        if not 0 <= message.model < len(self._servable.models):
            raise FrameError(f"Model.call of model {message.model}, which the servable doesn't have")
        model = self._servable.models[message.model]
        deadlines = [call.deadline for call in calls if call.deadline is not None]
        deadline = max(deadlines) if len(deadlines) == len(calls) else None
        session = calls[0].session

        async def one(values: tuple[Any, ...]) -> tuple[Any, ...] | ShardserveError:
            try:
                return await self._models.run(model, message.subgraph, values, deadline, session)
            except ShardserveError as error:
                return error

        return await asyncio.gather(*map(one, instances))


def _may_share(call: StageCall, first: StageCall) -> bool:
    same = (call.method, call.number) == (first.method, first.number)
    return same and not call.alone and call.session is None


def _is_over(call: StageCall) -> bool:
    if call.deadline is not None and call.deadline <= time.monotonic():
        call.fail(DeadlineExceeded(f"{call.where}: the deadline passed while the request waited for a process"))
    return call.answer.done()
