"""The one sequencer: which calls become the next step of which group, and what becomes of those that were cut short."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from shardserve.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ShardserveError,
    StepError,
    Unavailable,
)
from shardserve.settings import Settings
from shardserve.wire.frames import FrameError, Payload
from shardserve.worker.batching import Batch, Batching, Call
from shardserve.worker.group import ReplicaGroup

logger = logging.getLogger(__name__)

# A call under which so many generations ended is taken for their cause (DESIGN rule 4).
ENDINGS_ALLOWED = 1


class Scheduler:
    """A first-come queue in front of all groups.

    While a group has room, it gets the calls at the front that may share a batch; while none has, they collect. A call
    that was under way when a generation ended is a suspect: it goes back to the front and runs alone in its group.
    """

    def __init__(self, groups: list[ReplicaGroup], settings: Settings) -> None:
        self.batching: Batching | None = None
        self._batching_known = asyncio.Event()
        self._groups = groups
        self._settings = settings
        self._queue: deque[Call] = deque()
        self._closed: str | None = None

    def set_batching(self, batching: Batching) -> None:
        """The model's signature is known: the first agent has brought it. What waits has to fit it as well: it may have
        been checked against that of an export whose agents have all left.
        """
        self.batching = batching
        self._batching_known.set()
        waiting, self._queue = self._queue, deque()
        for call in waiting:
            try:
                call.key = batching.key(call.arrays)
            except InvalidInput as error:
                self._refuse(call, error)
            else:
                self._queue.append(call)

    async def model_known(self) -> Batching:
        """The signature's checks; waits for the first agent if none has come yet. Unavailable if none will come."""
        if self.batching is None and self._closed is None:
            await self._batching_known.wait()
        if self.batching is None:
            assert self._closed is not None
            raise Unavailable(self._closed)
        return self.batching

    def submit(self, call: Call) -> None:
        """Overloaded if the queue is full, Unavailable if the servable has ended."""
        if self._closed is not None:
            raise Unavailable(self._closed)
        if len(self._queue) >= self._settings.queue_limit:
            raise Overloaded(f"{len(self._queue)} instances wait already (queue_limit)")
        self._queue.append(call)
        self.pump()

    def pump(self) -> None:
        """Sends what can be sent."""
        while self._queue:
            group = self._free_group()
            if group is None:
                return
            calls = self._take(group)
            if not calls:
                return
            assert self.batching is not None
            group.send_step(self.batching.make_batch(calls))

    def _free_group(self) -> ReplicaGroup | None:
        free = [group for group in self._groups if group.has_room and not group.exclusive]
        return min(free, key=lambda group: group.in_flight, default=None)

    def _take(self, group: ReplicaGroup) -> list[Call]:
        """The next batch's calls; none if the first must wait until this group is empty."""
        assert self.batching is not None
        calls: list[Call] = []
        while self._queue:
            call = self._queue[0]
            if self._is_over(call):
                self._queue.popleft()
                continue
            if call.alone:
                if not calls and group.in_flight == 0:
                    calls.append(self._queue.popleft())
                return calls
            if calls and (len(calls) >= self.batching.max_size or call.key != calls[0].key):
                return calls
            calls.append(self._queue.popleft())
        return calls

    @staticmethod
    def _is_over(call: Call) -> bool:
        if call.answer.done():
            return True
        if call.deadline is not None and call.deadline <= time.monotonic():
            call.answer.set_exception(DeadlineExceeded("the deadline passed while the request waited for its step"))
            return True
        return False

    def answered(self, batch: Batch, payload: Payload) -> None:
        assert self.batching is not None
        try:
            results = self.batching.split_batch(batch, payload)
        except FrameError as error:
            raise FrameError(f"the leader's output doesn't have the exported shapes: {error}") from error
        for call, outputs in zip(batch.calls, results, strict=True):
            if not call.answer.done():
                call.answer.set_result(outputs)

    def failed(self, batch: Batch, message: str) -> None:
        """The model raised. Of several calls, each runs again alone, so that only the one at fault fails."""
        if len(batch.calls) == 1:
            self._refuse(batch.calls[0], StepError(message))
            return
        for call in reversed(batch.calls):
            call.alone = True
            self._put_back(call)

    def interrupted(self, batches: list[Batch]) -> None:
        """A generation ended under these batches: their calls are replayed, alone, in their old order."""
        for batch in reversed(batches):
            for call in reversed(batch.calls):
                call.endings += 1
                call.alone = True
                if call.endings > ENDINGS_ALLOWED:
                    logger.error("a request is given up: %d generations ended while it ran", call.endings)
                    self._refuse(call, Aborted(f"{call.endings} generations of the group ended while this request ran"))
                else:
                    self._put_back(call)

    def _put_back(self, call: Call) -> None:
        if self._closed is None:
            self._queue.appendleft(call)
        else:
            self._refuse(call, Unavailable(self._closed))

    def close(self, reason: str) -> None:
        """Answers all that wait, and all that come or come back, with Unavailable."""
        self._closed = reason
        self._batching_known.set()
        while self._queue:
            self._refuse(self._queue.popleft(), Unavailable(reason))

    def reopen(self) -> None:
        """Takes calls again."""
        self._closed = None

    @staticmethod
    def _refuse(call: Call, error: ShardserveError) -> None:
        if not call.answer.done():
            call.answer.set_exception(error)
