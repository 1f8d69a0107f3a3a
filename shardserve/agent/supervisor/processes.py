"""The fork server and the agents that it has forked, as the supervisor sees them: descriptors, and how each ended.

Python's own forkserver re-runs the user's script in each child and reports a living child as dead when the server dies;
this one is a module of ours that imports torch once (1.3 to 3 s) and forks an agent in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time

import msgspec

from shardserve.agent.forking import (
    ATTACHED,
    MESSAGE_LIMIT,
    EndingReply,
    EndingRequest,
    ForkReply,
    ForkRequest,
    LastWords,
    Loaded,
    Loading,
    Said,
    ToForkServer,
)
from shardserve.errors import StartError
from shardserve.wire.process import HUGE_PAGES, spawn

ENVIRONMENT = {
    # Before numpy is imported: its thread pool would not survive the fork, and torch has its own.
    "OPENBLAS_NUM_THREADS": "1",
    # OpenMP's threads would spin for milliseconds after each operator, on cores that the other agents and the server
    # need: an agent of 2 threads on 2 cores took 2.1 ms of CPU for a step of 0.2 ms.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch's watchdog of NCCL is to end neither the process nor a collective: the Worker is told of a death, has limits
    # of its own, and ends the generation. 0: it doesn't handle errors, which each step looks for.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # After a CUDA error, too, the request has its error first.
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # Nor is it to ask our store whether others have errors, or to wait a minute for what it writes about its own.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    # Its flight recorder takes a traceback for each collective.
    "TORCH_FR_BUFFER_SIZE": "0",
    **HUGE_PAGES,
}
"""Of the fork server and its agents, read when a process or a library starts; what the user has set stays."""


class AgentProcess:
    """A forked agent: pidfd becomes readable when the process ends, `words` when it has said something. forked_at,
    loaded_at (None: it hasn't said so): on CLOCK_MONOTONIC, in seconds."""

    def __init__(self, pid: int, pidfd: int, words: int) -> None:
        os.set_blocking(words, False)
        self.pid, self.pidfd, self.words = pid, pidfd, words
        self.forked_at = time.monotonic()
        self.loaded_at: float | None = None
        self.loading: Loading | None = None
        self._last_words: LastWords | None = None
        self._unread = b""

    def read(self) -> bool:
        """Takes in what it has said since the last time, if anything; False when it says no more."""
        try:
            data = os.read(self.words, MESSAGE_LIMIT)
        except BlockingIOError:
            return True
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            # A process that was killed while it spoke leaves half a message.
            with contextlib.suppress(msgspec.DecodeError):
                message: LastWords | Loading | Loaded = msgspec.json.decode(line, type=Said)
                match message:
                    case Loading():
                        self.loading = message
                    case Loaded():
                        self.loaded_at = time.monotonic()
                    case LastWords():
                        self._last_words = message
        return bool(data)

    def read_last_words(self) -> LastWords | None:
        """What an agent that has ended had to say; None too where it was killed while it spoke."""
        # All of it is there: its end of the pipe went with it.
        self.read()
        return self._last_words

    def kill(self) -> None:
        # The fork server may have reaped it already, although nobody here has looked at its pidfd yet.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.words)


class ForkServer:
    """A running `python -m shardserve.agent.fork_server`. Its end ends all agents that it forked. ending:
    how it ended, for logs; "" as long as it is of use. was_silent: it was killed since it did not answer."""

    def __init__(self) -> None:
        self._process, self.pidfd, self._socket = spawn(
            "shardserve.agent.fork_server", kind=socket.SOCK_SEQPACKET, environment=ENVIRONMENT
        )
        self._socket.setblocking(False)
        self._turn = asyncio.Lock()
        self.has_forked = False
        self.was_silent = False
        self.ending = ""
        self._readable: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def fork(self, request: ForkRequest, shared_memory: int | None, timeout: float) -> AgentProcess:
        """A new agent; StartError if it can't be forked. ConnectionError if the fork server ended, as it does
        when it is silent for `timeout` seconds: a later answer would be taken for that to the next request.
        """
        data, fds = await self._ask(request, [] if shared_memory is None else [shared_memory], timeout)
        reply = msgspec.msgpack.decode(data, type=ForkReply)
        if reply.error:
            raise StartError(f"the fork server (pid {self.pid}) could not fork: {reply.error}")
        self.has_forked = True
        if len(fds) < ATTACHED:
            # Nobody could watch it.
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(ProcessLookupError):
                os.kill(reply.pid, signal.SIGKILL)
            raise StartError(f"this process (pid {os.getpid()}) has no descriptors left for an agent")
        return AgentProcess(reply.pid, *fds)

    async def ending_of(self, pid: int, timeout: float) -> str:
        """How an agent ended that is no more, to follow its pid in a text. ConnectionError as `fork`."""
        data, _ = await self._ask(EndingRequest(pid), [], timeout)
        return _in_words(msgspec.msgpack.decode(data, type=EndingReply).code)

    async def _ask(self, request: ToForkServer, fds: list[int], timeout: float) -> tuple[bytes, list[int]]:
        """One at a time: its answer, and the descriptors with it."""
        async with self._turn:
            try:
                return await asyncio.wait_for(self._exchange(request, fds), timeout)
            except asyncio.TimeoutError:
                self.was_silent = True
                advice = "" if self.has_forked else "; if torch takes longer to import, raise SHARDSERVE_START_TIMEOUT"
                self._end(f"did not answer within {timeout:g} s (start_timeout) and was killed{advice}")
                raise self._ended_error() from None

    async def _exchange(self, request: ToForkServer, fds: list[int]) -> tuple[bytes, list[int]]:
        if self.ending:
            raise self._ended_error()
        loop = asyncio.get_running_loop()
        socket.send_fds(self._socket, [msgspec.msgpack.encode(request)], fds)
        self._readable = readable = loop.create_future()
        loop.add_reader(self._socket, lambda: None if readable.done() else readable.set_result(None))
        try:
            await readable
        finally:
            if not self.ending:
                loop.remove_reader(self._socket)
                self._readable = None
        # It may have been closed between the event and this line.
        if self.ending:
            raise self._ended_error()
        data, received, _, _ = socket.recv_fds(self._socket, MESSAGE_LIMIT, ATTACHED)
        if not data:
            raise self._ended_error()
        return data, received

    def close(self) -> None:
        """Ends the fork server, and with it whatever agent is left; a fork under way fails with ConnectionError."""
        self._end(_in_words(self._process.poll()))
        os.close(self.pidfd)

    def _end(self, ending: str) -> None:
        if self.ending:
            return
        self.ending = ending
        if self._readable is not None:
            # Before the socket is closed: its number may go to another socket, which the loop would take for this one.
            self._readable.get_loop().remove_reader(self._socket)
            if not self._readable.done():
                self._readable.set_exception(self._ended_error())
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _ended_error(self) -> ConnectionError:
        return ConnectionResetError(f"the fork server (pid {self.pid}) {self.ending or 'died'}")


def _in_words(code: int | None) -> str:
    """How a process ended, by its exit code or minus a signal."""
    if code is None:
        return "died"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"
