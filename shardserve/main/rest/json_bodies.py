"""JSON bodies of any size: small ones are read and written at once, large ones by a process of their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from shardserve.errors import DeadlineExceeded, ShardserveError, Unavailable, from_wire
from shardserve.main.rest import codec
from shardserve.main.rest.json_link import JsonLink, Reply
from shardserve.main.router import Decoded
from shardserve.main.servable import Result
from shardserve.restarts import RestartBudget
from shardserve.settings import Settings
from shardserve.wire.frames import Buffer, FrameError, split
from shardserve.wire.messages import TensorMeta, bodies, front

logger = logging.getLogger(__name__)

LARGE = 256 << 10
"""Bytes of a body, or of a reply's tensors, that take the event loop some 5 ms; more of them go to the process."""

# What else takes its time, in bytes that take as much: a string of an output, an array in it. A key takes more than
# this, but with the process Main has a third of the work left, and the request takes longer.
PER_KEY, PER_STRING, PER_ARRAY = 48, 32, 16


def is_large(pieces: list[bytes]) -> bool:
    """Whether a body in pieces goes to the process."""
    return sum(len(piece) + PER_KEY * piece.count(b":") for piece in pieces) > LARGE


def _is_large_reply(metas: Iterable[TensorMeta]) -> bool:
    return (
        sum(
            meta.nbytes + PER_STRING * len(meta.lengths or ()) + PER_ARRAY * codec.arrays_of(meta.shape)
            for meta in metas
        )
        > LARGE
    )


class JsonBodies:
    """Starts the process with the first large body, and another with the next one after it has died: only the body that
    it had then is refused. It has one at a time, the others wait for their turn; whoever gives up before leaves
    nothing, and what it has already it finishes, within json_timeout.

    deadline: a reading of time.monotonic(), after which DeadlineExceeded is raised; None: none but json_timeout.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._link: JsonLink | None = None
        self._budget = RestartBudget(settings)
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unsent(self) -> int:
        """Bytes that the process hasn't taken yet."""
        return self._link.unsent if self._link is not None else 0

    async def decode(
        self, pieces: list[bytes], dtypes: Mapping[str, str], max_instances: int, deadline: float | None = None
    ) -> list[Decoded]:
        """As codec.decode_request, of a body in pieces. Unavailable if the process died of it, or too often."""
        if not is_large(pieces):
            return codec.decode_request(b"".join(pieces), dtypes, max_instances)
        sizes = [len(piece) for piece in pieces]
        message = bodies.ReadBody(next(self._numbers), sizes, dict(dtypes), max_instances)
        what = f"a JSON body of {sum(sizes)} bytes to be read"
        answer, payload = await self._ask(message, list(pieces), what, deadline)
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

    async def encode(self, results: Sequence[Result], deadline: float | None = None) -> bytes | memoryview:
        """As codec.encode_reply. Unavailable if the process died of it, or too often."""
        good = [result for result in results if not isinstance(result, ShardserveError)]
        parts = [part for _, found in good for part in found]
        if not _is_large_reply(meta for metas, _ in good for meta in metas.values()):
            return codec.encode_reply(results)
        outcomes: list[front.InstanceOutputs | front.InstanceError] = [
            front.InstanceError(type(result).__name__, str(result))
            if isinstance(result, ShardserveError)
            else front.InstanceOutputs(result[0])
            for result in results
        ]
        message = bodies.WriteBody(next(self._numbers), outcomes)
        what = f"outputs of {sum(part.nbytes for part in parts)} bytes to be written as JSON"
        answer, payload = await self._ask(message, [part.data for part in parts], what, deadline)
        if not isinstance(answer, bodies.Written):
            raise FrameError(f"{type(answer).__name__} came where Written belongs")
        return payload[: answer.nbytes].data

    async def close(self) -> None:
        """Ends the process; what it has is refused, and so are those that wait."""
        self._closed = True
        if self._link is not None:
            self._link.end("the server is stopping")
        async with self._turn:  # After all that wait for it.
            await asyncio.gather(*self._tasks)

    async def _ask(self, message: bodies.ToProcess, buffers: list[Buffer], what: str, deadline: float | None) -> Reply:
        began = time.monotonic()
        asking = self._ask_in_turn(message, buffers, what)
        try:
            answer, payload = await asyncio.wait_for(asking, None if deadline is None else deadline - began)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"waited {time.monotonic() - began:.3f} s for {what}") from None
        if isinstance(answer, bodies.Refused):
            raise from_wire(answer.error, answer.message)
        return answer, payload

    async def _ask_in_turn(self, message: bodies.ToProcess, buffers: list[Buffer], what: str) -> Reply:
        await self._turn.acquire()
        try:
            link = await self._living()
            answered = link.ask(message, buffers, what, self._settings.json_timeout)
        except BaseException:
            self._turn.release()
            raise
        # Released by the answer, not by the asker who gives up: until then the body is in the process or on its way
        # there, and another would come on top of it.
        answered.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(answered)

    async def _living(self) -> JsonLink:
        """The link to the process, which is started if there is none."""
        if self._closed:
            raise Unavailable("the server is stopping")
        if self._link is not None:
            return self._link
        if self._budget.spent:
            raise Unavailable(
                f"the process for large JSON bodies died {self._budget} (max_restarts, restart_window); until that is "
                "over none is started"
            )
        try:
            link = JsonLink(self._lost)
        except OSError as error:
            raise Unavailable(f"the process for large JSON bodies can't be started: {error}") from error
        try:
            await link.connect()
        except BaseException:
            link.end("it was not needed any more")
            raise
        if self._closed:
            link.end("the server is stopping")
            raise Unavailable("the server is stopping")
        self._link = link
        return link

    def _lost(self, link: JsonLink, reason: str) -> None:
        task = asyncio.get_running_loop().create_task(link.reap())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if link is not self._link:
            return
        self._link = None
        if not self._closed:
            self._budget.spend()
            logger.error("the process for large JSON bodies (pid %d) is gone: %s", link.pid, reason)
