"""JSON bodies of any size: small ones are read and written at once, large ones by a process of their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from shardserve.errors import ShardserveError, Unavailable, from_wire
from shardserve.main import rest_codec
from shardserve.main.router import Decoded
from shardserve.main.servable import Result
from shardserve.wire.frames import Buffer, FrameError, Payload, split
from shardserve.wire.messages import bodies, front
from shardserve.wire.stream import FrameStream

logger = logging.getLogger(__name__)

LARGE = 256 << 10
"""Bytes of a body, or of a reply's tensors, that take the event loop some 5 ms; more of them go to the process."""

Answer = tuple[bodies.ToMain, Payload]


class JsonBodies:
    """Starts the process with the first large body, and another with the next one after it has died: only the body that
    it had then is refused. It has one at a time, the others wait for their turn."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._stream: FrameStream[bodies.ToMain] | None = None
        self._awaited = 0
        self._answer: asyncio.Future[Answer] | None = None
        self._ended: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def decode(self, pieces: list[bytes], dtypes: Mapping[str, str], max_instances: int) -> list[Decoded]:
        """As rest_codec.decode_request, of a body in pieces. Unavailable if the process died of it."""
        if sum(map(len, pieces)) <= LARGE:
            return rest_codec.decode_request(b"".join(pieces), dtypes, max_instances)
        sizes = [len(piece) for piece in pieces]
        message = bodies.ReadBody(next(self._numbers), sizes, dict(dtypes), max_instances)
        answer, payload = await self._ask(message, list(pieces))
        if not isinstance(answer, bodies.Read):
            raise FrameError(f"{type(answer).__name__} came where Read belongs")
        read = [instance for instance in answer.instances if isinstance(instance, dict)]
        parts = iter(split(payload, [meta.nbytes for metas in read for meta in metas.values()]))
        return [
            (instance, [part.data for part in itertools.islice(parts, len(instance))])
            if isinstance(instance, dict)
            else from_wire(instance.error, instance.message)
            for instance in answer.instances
        ]

    async def encode(self, results: Sequence[Result]) -> bytes | memoryview:
        """As rest_codec.encode_reply. Unavailable if the process died of it."""
        good = [result for result in results if not isinstance(result, ShardserveError)]
        parts = [part for _, found in good for part in found]
        if sum(part.nbytes for part in parts) <= LARGE:
            return rest_codec.encode_reply(results)
        outcomes: list[front.InstanceOutputs | front.InstanceError] = [
            front.InstanceError(type(result).__name__, str(result))
            if isinstance(result, ShardserveError)
            else front.InstanceOutputs(result[0])
            for result in results
        ]
        message = bodies.WriteBody(next(self._numbers), outcomes)
        answer, payload = await self._ask(message, [part.data for part in parts])
        if not isinstance(answer, bodies.Written):
            raise FrameError(f"{type(answer).__name__} came where Written belongs")
        return payload[: answer.nbytes].data

    async def close(self) -> None:
        """Ends the process; what it has is refused."""
        self._closed = True
        if self._stream is not None:
            self._stream.abort()
        if self._ended is not None:
            await self._ended.wait()

    async def _ask(self, message: bodies.ToProcess, buffers: list[Buffer]) -> Answer:
        async with self._turn:
            if self._closed:
                raise Unavailable("the server is stopping")
            stream = self._stream or await self._start()
            # Whoever asked before may have been cancelled: the answer is then still to come, and nobody's.
            self._awaited = message.request
            self._answer = asyncio.get_running_loop().create_future()
            stream.send(message, buffers)
            answer, payload = await self._answer
        if isinstance(answer, bodies.Refused):
            raise from_wire(answer.error, answer.message)
        return answer, payload

    async def _start(self) -> FrameStream[bodies.ToMain]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "shardserve.main.json_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        ended = self._ended = asyncio.Event()
        stream: FrameStream[bodies.ToMain] = FrameStream(
            bodies.ToMain, self._on_frame, lambda reason: self._on_lost(process, ended, reason)
        )
        await asyncio.get_running_loop().create_unix_connection(lambda: stream, sock=ours)
        self._stream = stream
        return stream

    def _on_frame(self, message: bodies.ToMain, payload: Payload) -> None:
        if message.request == self._awaited and self._answer is not None and not self._answer.done():
            self._answer.set_result((message, payload))

    def _on_lost(self, process: subprocess.Popen[bytes], ended: asyncio.Event, reason: Exception | None) -> None:
        self._stream = None
        process.kill()  # Without its connection it is of no use.
        reaping = asyncio.get_running_loop().create_task(_reap(process, ended))
        self._tasks.add(reaping)
        reaping.add_done_callback(self._tasks.discard)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Unavailable("the process that had this large JSON body ended; try it again"))
        if self._closed:
            return
        logger.error("the process for large JSON bodies (pid %d) ended%s", process.pid, f": {reason}" if reason else "")


async def _reap(process: subprocess.Popen[bytes], ended: asyncio.Event) -> None:
    await asyncio.to_thread(process.wait)
    ended.set()
