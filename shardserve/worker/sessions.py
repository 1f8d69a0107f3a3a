"""Stateful servables: which method call holds which group.

A session is one method call. From its beginning to its end it has a group for itself, unbatched; others wait in the
order in which they came, before their first stage: whoever waits for a process of the Python stages has a group
already, so nobody who has such a process waits for a group of others. Its first step resets what the agents keep. When
the group's generation ends before that, nothing is lost: it goes on with the next one, or with another group that is
free when it needs one. After that, or when a step raises, the session has no further step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardserve.errors import Aborted, Overloaded, ShardserveError, Unavailable
from shardserve.wire.messages import Generation
from shardserve.worker.answer import Answer
from shardserve.worker.calls import Call
from shardserve.worker.group import ReplicaGroup

NO_GENERATION = Generation(0, 0)


@dataclass(eq=False)
class Session:
    """One method call. turn: done when it is given a group, or told why not. group: what it holds, or held last. begun:
    whether it had a step; generation: that of its first one. void: why its state is lost. spoiled: why it has no
    further step, whatever it makes of those that it had."""

    turn: Answer[None] = field(default_factory=Answer)
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
        """Answers all that it waits for."""
        if not self.turn.done():
            self.turn.set_exception(error)
        while self.calls:
            self.calls.popleft().fail(error)


class Sessions:
    """The sessions that hold a group or wait for one. `send(group, call)` runs a call as the group's next step;
    `hopeless(group)` says why a group that doesn't serve won't before an operator has done something."""

    def __init__(
        self,
        groups: Sequence[ReplicaGroup],
        limit: int,
        send: Callable[[ReplicaGroup, Call], None],
        hopeless: Callable[[ReplicaGroup], str | None],
    ) -> None:
        self._groups = groups
        self._limit = limit
        self._send = send
        self._hopeless = hopeless
        self._holding: list[Session] = []
        self._waiting: list[Session] = []

    async def hold(self, session: Session) -> None:
        """Returns when the session has a group, the first thing that it needs. Overloaded if too many wait for one."""
        if len(self._waiting) >= self._limit:
            raise Overloaded(f"{len(self._waiting)} method calls wait for a group already (queue_limit)")
        self._waiting.append(session)
        self.pump()
        await session.turn

    def submit(self, session: Session, call: Call) -> None:
        """Of a session that had its turn. Aborted if its state is lost."""
        session.check()
        if session.spoiled:
            raise Aborted(session.spoiled)
        session.calls.append(call)

    def pump(self) -> None:
        """Sends what can be sent, and gives free groups to those that wait."""
        if not self._holding and not self._waiting:
            return
        for session in list(self._holding):
            self._check_generation(session)
            self._next(session)
        free = self._free_groups()
        while self._waiting and free:
            session = self._waiting.pop(0)
            session.group = free.pop()
            self._holding.append(session)
            if not session.turn.done():
                session.turn.set_result(None)
            self._next(session)

    def _free_groups(self) -> list[ReplicaGroup]:
        held = [session.group for session in self._holding]
        return [
            group for group in self._groups if group.state == "serving" and not group.in_flight and group not in held
        ]

    def _check_generation(self, session: Session) -> None:
        """Of one that holds a group."""
        group = session.group
        assert group is not None
        if session.begun and not (group.state == "serving" and group.generation == session.generation):
            self._holding.remove(session)
            session.void = (
                f"generation {session.generation} of the group ended, and with it the state of this method call"
            )
            session.refuse(Aborted(session.void))
        elif session.calls and group.state != "serving":
            self._find_other(session, group)

    def _find_other(self, session: Session, group: ReplicaGroup) -> None:
        """Its group doesn't serve, before its first step. It waits for that one, which nobody else can have meanwhile,
        and for none that is held: it may have a process of Python stages that the holder waits for."""
        if free := self._free_groups():
            session.group = free[0]
        elif (reason := self._hopeless(group)) is not None:
            session.refuse(Unavailable(reason))

    def _next(self, session: Session) -> None:
        self._drop_answered(session)
        group = session.group
        if not session.calls or session.void or group is None or group.state != "serving" or group.in_flight:
            return
        call = session.calls.popleft()
        call.begins = not session.begun
        if call.begins:
            session.begun, session.generation = True, group.generation
        self._send(group, call)

    @staticmethod
    def _drop_answered(session: Session) -> None:
        while session.calls:
            call = session.calls[0]
            now = time.monotonic()
            if call.deadline is not None and call.deadline <= now:
                call.expire(now)
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
