"""Stateful servables: which method call holds which group.

A session is one method call. From its beginning to its end it has a group for itself, unbatched; others wait in the
order in which they came, before their first stage: whoever waits for a process of the Python stages has a group
already, so nobody who has such a process waits for a group. Its first step resets what the agents keep. When the
group's generation ends after that, or a step raises, that is lost: the session has no further step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardserve.errors import Aborted, Overloaded, ShardserveError
from shardserve.wire.messages import Generation
from shardserve.worker.answer import Answer
from shardserve.worker.batching import Call
from shardserve.worker.group import ReplicaGroup

NO_GENERATION = Generation(0, 0)


@dataclass(eq=False)
class Session:
    """One method call. turn: done when it is given a group, or told why not. group: what it holds, or held last. begun:
    whether it had a step. void: why its state is lost. spoiled: why it has no further step, whatever it makes of those
    that it had."""

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
    """The sessions that hold a group or wait for one. `send(group, call)` runs a call as the group's next step."""

    def __init__(self, groups: Sequence[ReplicaGroup], limit: int, send: Callable[[ReplicaGroup, Call], None]) -> None:
        self._groups = groups
        self._limit = limit
        self._send = send
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
        if session.group is None and session not in self._waiting:
            self._wait_again(session)
        session.calls.append(call)

    def _wait_again(self, session: Session) -> None:
        """It lost its group before its first step. Aborted where others hold all groups: it may have a process that
        they wait for, or will."""
        if self._holding and not self._free_groups():
            raise Aborted("a generation of the group ended before this method call's first step; no other is free")
        self._waiting.insert(0, session)

    def pump(self) -> None:
        """Sends what can be sent, and gives free groups to those that wait."""
        if not self._holding and not self._waiting:
            return
        holding = list(self._holding)
        for session in holding:
            self._check_generation(session)
            self._next(session)
        for session in holding:
            if session.group is None and session.calls:
                # The generation ended between a call and its sending.
                try:
                    self._wait_again(session)
                except Aborted as error:
                    session.refuse(error)
        free = self._free_groups()
        while self._waiting and free:
            session, group = self._waiting.pop(0), free.pop()
            session.group, session.generation = group, group.generation
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
        group = session.group
        assert group is not None
        if group.state == "serving" and group.generation == session.generation:
            return
        self._holding.remove(session)
        if not session.begun:
            # Nothing is lost yet: another group, or the next generation, is as good.
            session.group = None
            return
        session.void = f"generation {session.generation} of the group ended, and with it the state of this method call"
        session.refuse(Aborted(session.void))

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
