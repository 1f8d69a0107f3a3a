"""A child process of the launcher: Main or a Worker, on a socketpair whose end ends it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

import msgspec

from shardserve.errors import StartError, from_wire
from shardserve.wire.frames import Payload
from shardserve.wire.messages import launch
from shardserve.wire.process import spawn
from shardserve.wire.stream import FrameStream

# Of heartbeat_timeout: the pause between an answered ping and the next.
PINGS = 4


class Child:
    """`python -m MODULE CONTROL FDS…`. `on_death` is called once, when it has ended and its orders have failed.

    Once it has said anything it has to answer a ping within `heartbeat` seconds, or it is killed."""

    def __init__(
        self,
        module: str,
        fds: Sequence[int],
        heartbeat: float,
        on_death: Callable[[Child], None],
        on_incarnation: Callable[[int], None] | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        self._beat: asyncio.TimerHandle | None = None
        self._killed_for = ""
        self._on_death = on_death
        self._on_incarnation = on_incarnation
        self.on_loaded: Callable[[], None] = lambda: None
        self.on_waiting: Callable[[launch.Waiting], None] = lambda _: None
        self._orders: dict[int, asyncio.Future[None]] = {}
        self._next_order = 0
        self._loop = asyncio.get_running_loop()
        self._process, self._pidfd, self._control = spawn(module, fds)
        self._module = module
        self._stream: FrameStream[launch.ToLauncher] = FrameStream(launch.ToLauncher, self._frame, lambda _: None)
        self.ended = asyncio.Event()
        self._ending = False
        self._loop.add_reader(self._pidfd, self._died)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def connect(self) -> None:
        """Needed once before the first order."""
        await self._loop.create_connection(lambda: self._stream, sock=self._control)

    def number(self) -> int:
        """For the next order."""
        self._next_order += 1
        return self._next_order

    async def order(self, message: msgspec.Struct, timeout: float | None) -> None:
        """Sends an order and waits until it is done; raises what it was refused with."""
        if self.ended.is_set():
            raise self._ended_error()
        number: int = message.order  # type: ignore[attr-defined]
        done = self._orders[number] = self._loop.create_future()
        self._stream.send(message)
        try:
            await asyncio.wait_for(done, timeout)
        except asyncio.TimeoutError:
            what = type(message).__name__
            raise StartError(f"{self._module} (pid {self.pid}) did not answer {what} within {timeout} s") from None
        finally:
            self._orders.pop(number, None)

    def _frame(self, message: launch.ToLauncher, payload: Payload) -> None:
        if self._beat is None:
            self._ping()
        match message:
            case launch.Pong() if self._beat is not None:
                self._beat.cancel()
                self._beat = self._loop.call_later(self._heartbeat / PINGS, self._ping)
            case launch.Done(order=number):
                self._settle(number, None)
            case launch.Refused(order=number, error=error, message=text):
                self.fail(number, from_wire(error, text))
            case launch.Loaded():
                self.on_loaded()
            case launch.Waiting():
                self.on_waiting(message)
            case launch.Incarnation(incarnation=incarnation):
                if self._on_incarnation is not None:
                    self._on_incarnation(incarnation)

    def _ping(self) -> None:
        if not self._ending:
            self._stream.send(launch.Ping())
            # If this process itself was stopped (a suspended host), the loop reads a pong that has come before it runs
            # timers.
            self._beat = self._loop.call_later(self._heartbeat, self._frozen)

    def _frozen(self) -> None:
        if not self._ending:
            self.kill(f"did not answer for {self._heartbeat:g} s (heartbeat_timeout)")

    def fail(self, number: int, error: Exception) -> None:
        """The order of this number, if it waits for an answer, raises this."""
        self._settle(number, error)

    def _settle(self, number: int, error: Exception | None) -> None:
        done = self._orders.get(number)
        if done is None or done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _died(self) -> None:
        self._ending = True
        if self._beat is not None:
            self._beat.cancel()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._stream.abort()
        for number in list(self._orders):
            self._settle(number, self._ended_error())
        self.ended.set()
        self._on_death(self)

    @property
    def end_in_words(self) -> str:
        """How it ended, with its pid."""
        code = f"ended with code {self._process.returncode}"
        return f"(pid {self.pid}) {f'was killed: it {self._killed_for}' if self._killed_for else code}"

    def _ended_error(self) -> StartError:
        return StartError(f"{self._module} {self.end_in_words}")

    def kill(self, reason: str = "") -> None:
        """Ends it at once; `reason` continues "it …" for whoever asks why it ended."""
        self._killed_for = self._killed_for or reason
        self._process.kill()

    async def end(self, message: msgspec.Struct, timeout: float) -> None:
        """Sends the stop order and waits for the process's end; kills it after `timeout` seconds."""
        self._ending = True
        self._stream.send(message)
        try:
            await asyncio.wait_for(self.ended.wait(), timeout)
        except asyncio.TimeoutError:
            self._process.kill()
            await self.ended.wait()
