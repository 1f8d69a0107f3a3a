"""Stateful servables: which method call holds which group.

A session is one method call. From its first step to its end it has a group for itself, unbatched; others wait in the
order in which they came. Its first step resets what the agents keep. When the group's generation ends, or a step
raises, that is lost: the session has no further step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardserve.errors import Aborted, DeadlineExceeded, Overloaded, ShardserveError
from shardserve.wire.messages import Generation
from shardserve.worker.batching import Call
from shardserve.worker.group import ReplicaGroup

NO_GENERATION = Generation(0, 0)


@dataclass(eq=False)
class Session:
    """One method call. group: what it holds, as long as it does. begun: whether it had a step. void: why its state is
    lost. spoiled: why it has no further step, whatever it makes of those that it had."""

    group: ReplicaGroup | None = None
    generation: Generation = NO_GENERATION
    calls: deque[Call] = field(default_factory=deque)
    begun: bool = False
    void: str = ""
    spoiled: str = ""

    def check(self) -> None:
        """Aborted if its state is lost."""
        if self.void:
            raise Aborted(self.void)

    def spoil(self, error: ShardserveError) -> None:
        """A step raised: some ranks may have changed their state, others not."""
        self.spoiled = f"a step of this method call raised, and with it its state is lost: {error}"
        self.refuse(Aborted(self.spoiled))

    def refuse(self, error: ShardserveError) -> None:
        """Answers all its waiting calls."""
        while self.calls:
            self.calls.popleft().fail(error)


class Sessions:
    """The sessions that hold a group or wait for one. `send(group, call)` runs a call as the group's next step."""

    def __init__(self, groups: Sequence[ReplicaGroup], limit: int, send: Callable[[ReplicaGroup, Call], None]) -> None:
        self._groups = groups
        self._limit = limit
        self._send = send
        self._holding: list[Session] = []
        self._waiting: list[Session] = []

    def submit(self, session: Session, call: Call) -> None:
        """Aborted if the session's state is lost, Overloaded if too many wait."""
        session.check()
        if session.spoiled:
            raise Aborted(session.spoiled)
        if session not in self._holding and session not in self._waiting:
            if len(self._waiting) >= self._limit:
                raise Overloaded(f"{len(self._waiting)} method calls wait for a group already (queue_limit)")
            self._waiting.append(session)
        session.calls.append(call)

    def pump(self) -> None:
        """Sends what can be sent, and gives free groups to those that wait."""
        if not self._holding and not self._waiting:
            return
        for session in list(self._holding):
            self._check_generation(session)
            self._next(session)
        held = [session.group for session in self._holding]
        free = [group for group in self._groups if group.state == "serving" and not group.in_flight]
        free = [group for group in free if group not in held]
        while self._waiting and free:
            session = self._waiting.pop(0)
            self._drop_answered(session)
            if session.calls:
                group = free.pop()
                session.group, session.generation = group, group.generation
                self._holding.append(session)
                self._next(session)

    def _check_generation(self, session: Session) -> None:
        group = session.group
        assert group is not None
        if group.state != "serving" or group.generation != session.generation:
            session.void = (
                f"generation {session.generation} of the group ended, and with it the state of this method call"
            )
            session.refuse(Aborted(session.void))
            self._holding.remove(session)

    def _next(self, session: Session) -> None:
        self._drop_answered(session)
        if session.calls and session.group is not None and not session.void and not session.group.in_flight:
            call = session.calls.popleft()
            call.begins, session.begun = not session.begun, True
            self._send(session.group, call)

    @staticmethod
    def _drop_answered(session: Session) -> None:
        while session.calls:
            call = session.calls[0]
            if call.deadline is not None and call.deadline <= time.monotonic():
                call.fail(DeadlineExceeded("the deadline passed while the request waited for its step"))
            if not call.answer.done():
                return
            session.calls.popleft()

    def release(self, session: Session) -> None:
        """The method call has ended: its group is free as soon as its last step has."""
        for sessions in (self._holding, self._waiting):
            if session in sessions:
                sessions.remove(session)

    def keep(self, fits: Callable[[Call], bool]) -> None:
        """Drops the waiting calls for which `fits` is false, and which it has answered."""
        for session in (*self._holding, *self._waiting):
            session.calls = deque(call for call in session.calls if fits(call))

    def close(self, error: ShardserveError) -> None:
        """Answers all that wait."""
        for session in (*self._holding, *self._waiting):
            session.refuse(error)
        self._waiting.clear()
