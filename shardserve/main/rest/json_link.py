"""The process that reads and writes large JSON bodies, and Main's connection to it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable

from shardserve.errors import DeadlineExceeded, ShardserveError, Unavailable
from shardserve.wire.frames import Buffer, FrameError, Payload
from shardserve.wire.messages import bodies
from shardserve.wire.stream import FrameStream

Reply = tuple[bodies.ToMain, Payload]


class JsonLink:
    """Starts the process; OSError if that can't be done. It is asked for one thing at a time. `lost(link, reason)` is
    called once, when it is of no more use and has been killed; somebody has to `reap` it then."""

    def __init__(self, lost: Callable[[JsonLink, str], None]) -> None:
        self._lost: Callable[[JsonLink, str], None] | None = lost
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shardserve.main.rest.json_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._stream: FrameStream[bodies.ToMain] = FrameStream(bodies.ToMain, self._on_frame, self._on_lost)
        self._number = 0
        self._answered: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unsent(self) -> int:
        return self._stream.unsent

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self._stream, sock=self._socket)

    def ask(self, message: bodies.ToProcess, buffers: list[Buffer], what: str, timeout: float) -> asyncio.Future[Reply]:
        """The answer to come. After `timeout` seconds it is a DeadlineExceeded that says what was waited for, and the
        process is killed; Unavailable if it ends before."""
        assert self._answered is None, "one at a time"
        loop = asyncio.get_running_loop()
        self._stream.send(message, buffers)
        self._number = message.request
        self._answered = loop.create_future()
        self._timer = loop.call_later(timeout, self._overdue, what, timeout)
        return self._answered

    def end(self, reason: str) -> None:
        """Kills the process; who waits for its answer is told that it is gone."""
        self._end(reason, Unavailable(f"the process that had this large JSON body ended ({reason}); try it again"))

    async def reap(self) -> None:
        await asyncio.to_thread(self._process.wait)

    def _overdue(self, what: str, timeout: float) -> None:
        reason = f"waited {timeout:g} s (json_timeout) for {what}"
        self._end(reason, DeadlineExceeded(f"{reason}; the process that does it, pid {self.pid}, was killed"))

    def _end(self, reason: str, error: ShardserveError) -> None:
        if self._lost is None:
            return
        lost, self._lost = self._lost, None
        self._process.kill()
        self._stream.abort()
        # Before the error is given: who gets it may ask again at once, and must not find this process.
        lost(self, reason)
        self._settle(error)

    def _settle(self, outcome: Reply | ShardserveError) -> None:
        answered, self._answered = self._answered, None
        if self._timer is not None:
            self._timer.cancel()
        if answered is None or answered.done():
            return
        if isinstance(outcome, ShardserveError):
            answered.set_exception(outcome)
            answered.exception()  # Whoever asked may have given up; nobody else has to hear of it.
        else:
            answered.set_result(outcome)

    def _on_frame(self, message: bodies.ToMain, payload: Payload) -> None:
        if self._answered is None or message.request != self._number:
            raise FrameError(f"an answer to {message.request} came out of turn")
        self._settle((message, payload))

    def _on_lost(self, reason: Exception | None) -> None:
        self.end(str(reason) if reason is not None else "it ended its connection")
