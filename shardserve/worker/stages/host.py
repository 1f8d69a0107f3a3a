"""One process for Python stages as the Worker sees it: started, given one run at a time, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from shardserve.errors import (
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    ShardserveError,
    StageError,
    from_wire,
)
from shardserve.servable import PythonStage
from shardserve.settings import Settings
from shardserve.wire.frames import Buffer, FrameError, NoMemory, Payload
from shardserve.wire.messages import stages
from shardserve.wire.stream import FrameStream
from shardserve.worker.sessions import Session
from shardserve.worker.stages.values import Encoded, as_results, decode_results, decode_values, encode_values

logger = logging.getLogger(__name__)

State = Literal["loading", "idle", "running", "ended"]

NOBODY_WAITS = DeadlineExceeded("nobody waits for this request's answer any more")


@dataclass(eq=False)
class StageCall:
    """One instance's run through a Python stage. number: the stage's in its method, from 1. deadline: on
    CLOCK_MONOTONIC. alone: shares its call of the function with no other. where: names method and stage in errors."""

    method: str
    number: int
    stage: PythonStage
    values: tuple[Any, ...]
    deadline: float | None
    session: Session | None
    answer: asyncio.Future[tuple[Any, ...]]
    alone: bool = False

    @property
    def where(self) -> str:
        return f"method {self.method!r}, stage {self.stage.tag!r}"

    def fail(self, error: ShardserveError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class HostOwner(Protocol):
    """What a host needs of the pool around it."""

    def loaded(self, host: StageHost) -> None: ...
    def load_failed(self, host: StageHost, message: str) -> None: ...
    def finished(self, host: StageHost) -> None: ...
    def died(self, host: StageHost, reason: str, calls: list[StageCall]) -> None: ...
    def too_large(self, error: MessageTooLarge, calls: list[StageCall]) -> None: ...
    async def call_model(
        self, message: stages.ModelCall, instances: list[tuple[Any, ...]], calls: Sequence[StageCall]
    ) -> list[tuple[Any, ...] | ShardserveError]: ...


@dataclass(eq=False)
class Running:
    """A run without an answer. timers: what ends it; model_calls: what it waits for, by the number of the call."""

    calls: list[StageCall]
    since: float
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    model_calls: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def waited_for(self) -> bool:
        return any(not call.answer.done() for call in self.calls)


class StageHost:
    """Made by `start`. state: loading, idle, running or ended. A run that hangs ends it. OSError if it can't be had."""

    def __init__(self, owner: HostOwner, settings: Settings) -> None:
        self._owner = owner
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            self._ours, theirs = socket.socketpair()
            undo.callback(self._ours.close)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "shardserve.worker.stages", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        self._stream: FrameStream[stages.ToWorker] = FrameStream(stages.ToWorker, self._frame, self._lost)
        self._running: Running | None = None
        self._runs = 0
        self._killed_for = ""
        self.state: State = "loading"
        self._load_timer = self._loop.call_later(settings.start_timeout, self._load_timed_out)
        self._loop.add_reader(self._pidfd, self._died)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def killed(self) -> bool:
        """Whether this Worker has ended it."""
        return bool(self._killed_for)

    async def start(self, load: stages.Load) -> None:
        await self._loop.create_connection(lambda: self._stream, sock=self._ours)
        self._stream.send(load)

    def run(self, calls: list[StageCall]) -> None:
        """Runs calls of one stage; needs state idle."""
        assert self.state == "idle"
        sent: list[StageCall] = []
        instances: list[Encoded] = []
        for call in calls:
            try:
                instances.append(encode_values(call.values, f"{call.where}: input"))
            except InvalidInput as error:
                call.fail(StageError(str(error)))
                continue
            sent.append(call)
        if not sent:
            self._owner.finished(self)
            return
        self.state = "running"
        self._runs += 1
        running = self._running = Running(sent, time.monotonic())
        running.timers.append(self._loop.call_later(self._settings.stage_timeout, self._run_timed_out, running))
        deadlines = [call.deadline for call in sent if call.deadline is not None]
        if len(deadlines) == len(sent):
            last = max(deadlines)
            left = max(0.0, last - running.since)
            running.timers.append(self._loop.call_later(left, self._deadline_passed, running, last))
        for call in sent:
            call.answer.add_done_callback(lambda _: self._answered(running))
        buffers: list[Buffer] = [buffer for _, parts in instances for buffer in parts]
        first = sent[0]
        order = stages.Run(self._runs, first.method, first.number, [metas for metas, _ in instances])
        try:
            self._stream.send(order, buffers)
        except MessageTooLarge as error:
            self._end_run()
            self.state = "idle"
            self._owner.too_large(error, sent)

    # What ends a run.

    def _answered(self, running: Running) -> None:
        """One of its calls was answered, or given up by whoever waited for it."""
        if self._running is not running or running.waited_for:
            return
        self._give_up_model_calls(running, NOBODY_WAITS)
        grace = self._settings.stage_grace
        reason = f"ran on for {grace} s (stage_grace) when nobody waited for it any more"
        running.timers.append(self._loop.call_later(grace, self.kill, reason))

    def _deadline_passed(self, running: Running, moment: float) -> None:
        # A timer of uvloop may come a millisecond before the moment that it was set for, and comes once.
        now = max(time.monotonic(), moment)
        for call in running.calls:
            if call.deadline is not None and call.deadline <= now:
                passed = now - running.since
                call.fail(DeadlineExceeded(f"{call.where}: the deadline passed while it ran ({passed:.3f} s)"))

    def _run_timed_out(self, running: Running) -> None:
        """Of several instances one may be at fault: those that can still be waited for are left to the owner."""
        seconds = self._settings.stage_timeout
        self._deadline_passed(running, time.monotonic())
        if len(running.calls) == 1:
            [call] = running.calls
            call.fail(StageError(f"{call.where}: gave no result within stage_timeout ({seconds} s)"))
        self.kill(f"gave no result of {running.calls[0].where} within stage_timeout ({seconds} s)")

    def _load_timed_out(self) -> None:
        seconds = self._settings.start_timeout
        self.kill(f"did not load the servable within start_timeout ({seconds} s)")

    def kill(self, reason: str) -> None:
        """Ends the process; `died` follows."""
        if self.state == "ended":
            return
        self._killed_for = self._killed_for or reason
        logger.warning("the process of Python stages (pid %d) is killed: it %s", self.pid, reason)
        self._process.kill()

    def close(self) -> list[StageCall]:
        """Ends the process now, without a word to the owner; gives the calls that it had."""
        if self.state == "ended":
            return []
        self._process.kill()
        return self._end()

    def _end(self) -> list[StageCall]:
        self.state = "ended"
        self._load_timer.cancel()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._stream.abort()
        return self._end_run()

    def _end_run(self) -> list[StageCall]:
        running, self._running = self._running, None
        if running is None:
            return []
        for timer in running.timers:
            timer.cancel()
        for task in running.model_calls.values():
            task.cancel()
        return running.calls

    def _died(self) -> None:
        loading = self.state == "loading"
        calls = self._end()
        reason = self._killed_for or f"ended with code {self._process.returncode}"
        if loading:
            self._owner.load_failed(self, f"the process of Python stages (pid {self.pid}) {reason}")
        else:
            self._owner.died(self, reason, calls)

    def _lost(self, reason: Exception | None) -> None:
        if isinstance(reason, FrameError):
            self.kill(f"said what it should not: {reason}")
        elif isinstance(reason, NoMemory):
            self.kill(f"gave more than the Worker can take: {reason}")
        elif self.state != "ended":
            # A process without its connection is of no use. Its pidfd tells when it has ended, and by which code.
            self._process.kill()

    # What the process says.

    def _frame(self, message: stages.ToWorker, payload: Payload) -> None:
        match message:
            case stages.Loaded() if self.state == "loading":
                self._load_timer.cancel()
                self.state = "idle"
                self._owner.loaded(self)
            case stages.LoadFailed(message=text) if self.state == "loading":
                self.close()
                self._owner.load_failed(self, text)
            case stages.Finished(run=number) if self._running is not None and number == self._runs:
                self._finish(self._running, decode_results(message.results, payload))
            case stages.ModelCall() if self._running is not None:
                self._call_model(self._running, message, decode_values(message.instances, payload))
            case _:
                raise FrameError(f"{type(message).__name__} came out of turn")

    def _finish(self, running: Running, results: list[tuple[Any, ...] | stages.Failure]) -> None:
        if len(results) != len(running.calls):
            raise FrameError(f"{len(results)} results came for {len(running.calls)} instances")
        # Before the next run: a thread that the function left waits for its answer, and reads what comes first.
        self._give_up_model_calls(running, ConfigError("Model.call: the run of the Python stage ended meanwhile"))
        self._end_run()
        if not self._killed_for:
            # If it is being killed, these results came just in time; it must not get another call.
            self.state = "idle"
        for call, result in zip(running.calls, results, strict=True):
            if isinstance(result, stages.Failure):
                call.fail(from_wire(result.error, result.message))
            elif not call.answer.done():
                call.answer.set_result(result)
        self._owner.finished(self)

    def _call_model(self, running: Running, message: stages.ModelCall, instances: list[tuple[Any, ...]]) -> None:
        if not running.waited_for:
            self._answer_model_call(message.call, [NOBODY_WAITS])
            return

        async def answer() -> None:
            outcomes: list[tuple[Any, ...] | ShardserveError]
            try:
                outcomes = await self._owner.call_model(message, instances, running.calls)
            except Exception:
                logger.exception("%s: Model.call failed", running.calls[0].where)
                outcomes = [InternalError("an internal error; the server's log has more")] * len(instances)
            del running.model_calls[message.call]
            self._answer_model_call(message.call, outcomes)

        running.model_calls[message.call] = self._loop.create_task(answer())

    def _give_up_model_calls(self, running: Running, error: ShardserveError) -> None:
        """The function gets an error, and with it its end, instead of answers that nobody needs."""
        given_up, running.model_calls = running.model_calls, {}
        for call, task in given_up.items():
            task.cancel()
            self._answer_model_call(call, [error])

    def _answer_model_call(self, call: int, outcomes: Sequence[tuple[Any, ...] | ShardserveError]) -> None:
        """One outcome per instance; the first error is that of the call."""
        results, buffers = as_results(
            [out if isinstance(out, ShardserveError) else encode_values(out, "output") for out in outcomes]
        )
        self._stream.send(stages.ModelAnswer(call, results), buffers)
