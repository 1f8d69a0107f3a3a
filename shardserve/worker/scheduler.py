"""The one sequencer: which calls become the next step of which group, and what becomes of those that were cut short."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from shardserve.errors import (
    Aborted,
    InternalError,
    InvalidInput,
    Overloaded,
    ShardserveError,
    StepError,
    Unavailable,
)
from shardserve.settings import Settings
from shardserve.wire.frames import FrameError, Payload
from shardserve.worker.batching import Batching
from shardserve.worker.calls import Array, Batch, Call, Ending
from shardserve.worker.group import ReplicaGroup
from shardserve.worker.queue import CallQueue, Urgency
from shardserve.worker.sessions import Session, Sessions

logger = logging.getLogger(__name__)

# A call under which more generations ended is taken for their cause, if the last one had no other call in its window.
ENDINGS_ALLOWED = 1

_units = count(1)


class Scheduler:
    """One queue in front of all groups.

    While a group has room, it gets the most urgent call and those that may share its batch; while none has, they
    collect. What was under way when a generation ended is suspect: each batch runs again as it was, in a group whose
    window it has for itself, one at a time in all groups. A call under which a second one ends, and which was alone
    then, is given up; a batch of several is taken apart.
    `hopeless`: as `Sessions` has it.
    Calls of a stateful servable go through `Sessions` instead, and are never replayed: their state is lost.
    """

    def __init__(
        self,
        groups: list[ReplicaGroup],
        settings: Settings,
        hopeless: Callable[[ReplicaGroup], str | None] = lambda group: group.failure,
    ) -> None:
        self._batchings: Sequence[Batching] | None = None
        self._models_known = asyncio.Event()
        self._groups = groups
        self._settings = settings
        self._queue = CallQueue()
        self._delay_over: asyncio.TimerHandle | None = None
        self._pumping = False
        self._others_turn = False
        self._sessions = Sessions(groups, settings.queue_limit, lambda group, call: self._send(group, [call]), hopeless)
        self._closed: str | None = None

    def set_models(self, batchings: Sequence[Batching]) -> None:
        """The signatures of the agents' programs are known: the first agent has brought them. What waits has to fit
        them as well: it may have been checked against those of an export whose agents have all left.
        """
        self._batchings = batchings
        self._models_known.set()
        for call in self._queue.drain():
            if self._still_fits(call):
                self._queue.add(call)
        self._sessions.keep(self._still_fits)

    def _still_fits(self, call: Call) -> bool:
        try:
            if call.subgraph >= len(self._batchings or ()):
                raise InvalidInput(f"the model has no subgraph {call.subgraph} any more")
            batching = self._batching(call.subgraph)
            batching.check_count(len(call.arrays))
            call.key, call.lengths = batching.key(call.arrays), batching.lengths(call.arrays)
        except InvalidInput as error:
            call.fail(error)
            return False
        return True

    async def models_known(self) -> Sequence[Batching]:
        """Each program's checks; waits for the first agent if none has come yet. Unavailable if none will come."""
        if self._batchings is None and self._closed is None:
            await self._models_known.wait()
        if self._batchings is None:
            assert self._closed is not None
            raise Unavailable(self._closed)
        return self._batchings

    def _batching(self, subgraph: int) -> Batching:
        assert self._batchings is not None
        return self._batchings[subgraph]

    @property
    def known_models(self) -> Sequence[Batching] | None:
        """As `models_known` gives them; None as long as no agent has come."""
        return self._batchings

    def submit(self, call: Call) -> None:
        """As `enqueue`, and sent in the loop's next turn: calls that come in the same one may share a batch."""
        self.enqueue(call)
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pumping = False
        self.pump()

    def enqueue(self, call: Call) -> None:
        """Overloaded if the queue is full, Unavailable if the servable has ended, Aborted if its session is void.
        `pump` when all are there that it may share a batch with."""
        if self._closed is not None:
            raise Unavailable(self._closed)
        if call.session is not None:
            self._sessions.submit(call.session, call)
            return
        if len(self._queue) >= self._settings.queue_limit:
            raise Overloaded(f"{len(self._queue)} instances wait already (queue_limit)")
        call.held_until = self._batching(call.subgraph).held_until(call)
        self._queue.add(call)
        # A call whose client has left must not hold memory until its turn.
        call.answer.add_done_callback(lambda _: self._answered_in_queue(call))

    def _answered_in_queue(self, call: Call) -> None:
        if self._queue.discard(call):
            self._left(call)

    def pump(self) -> None:
        """Sends what can be sent."""
        self._sessions.pump()
        kept = self._replay()
        self._serve(kept)

    def _serve(self, kept: ReplicaGroup | None = None, before: Urgency | None = None) -> None:
        """Sends what is no suspect to groups with room other than `kept`; before: only what is more urgent."""
        while self._queue:
            group = self._free_group(kept)
            if group is None:
                return
            calls = self._queue.take(self._batchings or (), before)
            if not calls:
                if before is None:
                    self._pump_at(self._queue.ready_at)
                return
            self._send(group, calls)

    def _replay(self) -> ReplicaGroup | None:
        """Sends the next suspects to a group with nothing else under way, or gives the one to keep free until it has.

        One batch of them at a time: a request that ends generations ends those of one group after the other, and the
        others go on. Before each batch what is more urgent has a turn, in which it may fill the windows: where only one
        group serves, neither has to wait until nothing of the other is left.
        """
        while (urgency := self._queue.next_suspect) is not None:
            if any(group.exclusive for group in self._groups):
                return None
            if self._others_turn:
                self._others_turn = False
                self._serve(before=urgency)
            group = self._free_group()
            if group is None or group.in_flight:
                return group
            calls = self._queue.take_suspects(self._batchings or ())
            if not calls:
                return None
            self._send(group, calls)
            self._others_turn = True
        return None

    def _pump_at(self, when: float | None) -> None:
        """Again when a delay is over; what waits for room is sent by whoever ends a step."""
        if self._delay_over is not None:
            self._delay_over.cancel()
            self._delay_over = None
        if when is not None:
            pause = max(0.0, when - time.monotonic())
            self._delay_over = asyncio.get_running_loop().call_later(pause, self.pump)

    def _send(self, group: ReplicaGroup, calls: list[Call]) -> None:
        try:
            batch = self._batching(calls[0].subgraph).make_batch(calls)
        except Exception as error:
            # These calls are out of the queue: whatever it is, it is theirs, and not that of whoever has called `pump`.
            logger.exception("a batch could not be made")
            wrong: ShardserveError = InternalError(f"a batch could not be made: {type(error).__name__}")
            if isinstance(error, MemoryError):
                wrong = Overloaded("the Worker has no memory for the inputs of a step")
            for call in calls:
                call.fail(wrong)
                if call.session is not None:
                    # The step that failed may have been the first, which resets the state: what the agents hold is
                    # another call's.
                    call.session.spoil(wrong)
            return
        group.send_step(batch)

    async def hold(self, session: Session) -> None:
        """Returns when the session has a group; Overloaded or Unavailable if it gets none."""
        if self._closed is not None:
            raise Unavailable(self._closed)
        await self._sessions.hold(session)

    def release(self, session: Session) -> None:
        """The method call has ended; the next one may have its group."""
        self._sessions.release(session)
        self._sessions.pump()

    def _free_group(self, kept: ReplicaGroup | None = None) -> ReplicaGroup | None:
        free = [group for group in self._groups if group.has_room and not group.exclusive and group is not kept]
        return min(free, key=lambda group: group.in_flight, default=None)

    def answered(self, batch: Batch, payload: Payload) -> Callable[[], None]:
        """What gives the batch's calls their answers. FrameError if the leader's output has the wrong size."""
        try:
            results = self._batching(batch.subgraph).split_batch(batch, payload)
        except FrameError as error:
            raise FrameError(f"the leader's output doesn't have the exported shapes: {error}") from error
        return partial(self._deliver, batch, results)

    @staticmethod
    def _deliver(batch: Batch, results: list[tuple[Array, ...]]) -> None:
        for call, outputs in zip(batch.calls, results, strict=True):
            if not call.answer.done():
                call.answer.set_result(outputs)

    def failed(self, batch: Batch, message: str) -> None:
        """The model raised. Of several calls, each runs again in a step of its own: only the one at fault fails."""
        if len(batch.calls) == 1:
            (call,) = batch.calls
            call.fail(StepError(message))
            if call.session is not None:
                call.session.spoil(StepError(message))
            return
        for call in batch.calls:
            self._put_back(call, next(_units))

    def interrupted(self, batches: list[Batch], ending: Ending) -> None:
        """A generation ended under these batches; its deaths are forgiven if that was a call's fault."""
        ending.suspects = len(batches[0].calls) if len(batches) == 1 else None
        for batch in batches:
            unit, several = next(_units), len(batch.calls) > 1
            for call in batch.calls:
                if call.session is not None:
                    call.fail(Aborted("a generation of the group ended, and with it the state of this method call"))
                    # It had the group for itself, and has no second run that would tell.
                    ending.forgive()
                    continue
                call.endings.append(ending)
                if len(call.endings) > ENDINGS_ALLOWED and not several:
                    self._give_up(call)
                elif call.answer.done():
                    self._left(call)
                else:
                    self._put_back(call, unit if len(call.endings) <= ENDINGS_ALLOWED else next(_units))

    def _give_up(self, call: Call) -> None:
        count = len(call.endings)
        logger.error("a request is given up: %d generations ended while it ran", count)
        call.fail(Aborted(f"{count} generations of the group ended while this request ran"))
        for ending in call.endings:
            ending.forgive()

    def _left(self, call: Call) -> None:
        """Nobody waits for it any more, so it won't run again. Where nothing else is left to blame it is taken for the
        cause: its client may send it again and again, and always leave before it can be given up."""
        for ending in call.endings:
            if ending.suspects is None:
                continue
            ending.suspects -= 1
            if ending.suspects == 0:
                ending.forgive()

    def _put_back(self, call: Call, unit: int) -> None:
        if call.answer.done():
            return
        if self._closed is None:
            # It has waited for others once.
            call.unit, call.held_until = unit, call.arrived
            self._queue.add(call)
        else:
            call.fail(Unavailable(self._closed))

    def close(self, reason: str) -> None:
        """Answers all that wait, and all that come or come back, with Unavailable."""
        self._closed = reason
        self._models_known.set()
        self._sessions.close(Unavailable(reason))
        for call in self._queue.drain():
            call.fail(Unavailable(reason))

    def reopen(self) -> None:
        """Takes calls again."""
        self._closed = None
