"""When steps were queued, sent and answered, and what the agents have recorded of theirs: told when Main asks."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from shardserve.settings import Settings
from shardserve.wire.messages import Generation, front, group
from shardserve.wire.messages.times import ReplicaTimes, StepNames
from shardserve.wire.stream import FrameStream
from shardserve.worker.calls import Batch

if TYPE_CHECKING:
    from shardserve.worker.group import AgentHandle, ReplicaGroup

Record = tuple[Generation, int, int, int, dict[str, int], float, float, float, bool, bool]
"""A step's generation, number, subgraph, instances and dims, then as in ReplicaTimes from `queued` on."""


class StepTimeline:
    """The last `capacity` steps of one group."""

    def __init__(self, capacity: int) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)

    def record(
        self, generation: Generation, step: int, batch: Batch, sent: float, answered: float, failed: bool, ended: bool
    ) -> None:
        """Keeps nothing of the batch but its dims, which steps of the same shapes share."""
        queued = sent
        # Not `min`: this is done for each step, and batches are mostly small.
        for call in batch.calls:
            if call.arrived < queued:
                queued = call.arrived
        size = len(batch.calls)
        self._records.append(
            (generation, step, batch.subgraph, size, batch.dims, queued, sent, answered, failed, ended)
        )

    def times(self) -> ReplicaTimes:
        records = list(self._records)
        numbers: dict[tuple[tuple[str, int], ...], int] = {}
        forms = [numbers.setdefault(tuple(r[4].items()), len(numbers)) for r in records]
        return ReplicaTimes(
            StepNames([r[0].incarnation for r in records], [r[0].counter for r in records], [r[1] for r in records]),
            subgraphs=[r[2] for r in records],
            instances=[r[3] for r in records],
            forms=forms,
            dims=[dict(form) for form in numbers],
            queued=[r[5] for r in records],
            sent=[r[6] for r in records],
            answered=[r[7] for r in records],
            failed=[r[8] for r in records],
            ended=[r[9] for r in records],
        )


@dataclass(eq=False)
class Inquiry:
    """One request of Main. pending: agents that have not answered yet, and when they were asked."""

    stream: FrameStream[front.ToWorker]
    request: int
    pending: dict[AgentHandle, float] = field(default_factory=dict)
    clocks: dict[AgentHandle, tuple[float, float]] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class AgentInquiries:
    """Asks all agents; each answer goes on to Main as it comes. Who is gone, or says nothing for half of
    the time until the deadline, is named as missing."""

    def __init__(self, groups: Sequence[ReplicaGroup], settings: Settings) -> None:
        self._groups = groups
        self._settings = settings
        self._numbers = count(1)
        self._under_way: dict[int, Inquiry] = {}

    def ask(self, stream: FrameStream[front.ToWorker], request: int, deadline: float) -> None:
        """deadline: on CLOCK_MONOTONIC."""
        number = next(self._numbers)
        inquiry = self._under_way[number] = Inquiry(stream, request)
        # First: what is answered by now, the agents have recorded, too.
        for replica in self._groups:
            stream.send(front.ReplicaTimeline(request, replica.replica, replica.timeline.times()))
        for replica in self._groups:
            for agent in replica.agents.values():
                inquiry.pending[agent] = time.monotonic()
                agent.stream.send(group.AskTimes(number))
        wait = max(0.0, deadline - time.monotonic()) / 2
        inquiry.timer = asyncio.get_running_loop().call_later(wait, self._timed_out, number)
        self._end_if_complete(number, inquiry)

    def answered(self, replica: ReplicaGroup, agent: AgentHandle, message: group.Clock | group.Times) -> None:
        """An answer that comes too late is nobody's."""
        inquiry = self._under_way.get(message.request)
        if inquiry is None or agent not in inquiry.pending:
            return
        if isinstance(message, group.Clock):
            inquiry.clocks[agent] = _clock(agent, inquiry.pending[agent], message.now)
            return
        del inquiry.pending[agent]
        offset, error = inquiry.clocks.pop(agent, (0.0, 0.0))
        inquiry.stream.send(
            front.RankTimeline(
                request=inquiry.request,
                replica=replica.replica,
                rank=agent.rank,
                stage=agent.stage,
                host=agent.host,
                device=agent.device,
                pid=agent.pid,
                offset=offset,
                error=error,
                times=message.times,
            )
        )
        self._end_if_complete(message.request, inquiry)

    def lost(self, agent: AgentHandle) -> None:
        """The agent's connection has ended."""
        for number, inquiry in list(self._under_way.items()):
            if agent in inquiry.pending:
                self._drop(number, inquiry, [agent])

    def _timed_out(self, number: int) -> None:
        inquiry = self._under_way[number]
        self._drop(number, inquiry, list(inquiry.pending))

    def _drop(self, number: int, inquiry: Inquiry, agents: list[AgentHandle]) -> None:
        for agent in agents:
            del inquiry.pending[agent]
            inquiry.missing.append(agent.rank)
        self._end_if_complete(number, inquiry)

    def _end_if_complete(self, number: int, inquiry: Inquiry) -> None:
        if inquiry.pending:
            return
        del self._under_way[number]
        if inquiry.timer is not None:
            inquiry.timer.cancel()
        missing = tuple(sorted(inquiry.missing))
        capacity = self._settings.timeline_steps
        inquiry.stream.send(front.TimelineEnd(inquiry.request, capacity, time.monotonic(), missing))


def _clock(agent: AgentHandle, asked: float, now: float) -> tuple[float, float]:
    """How far the agent's CLOCK_MONOTONIC is ahead of ours, and by how much that may be wrong, in seconds: it read its
    clock somewhere between our question and its answer. On one host there is one clock."""
    connection = agent.stream.peer_socket
    if connection is not None and connection.family == socket.AF_UNIX:
        return 0.0, 0.0
    came = time.monotonic()
    return now - (asked + came) / 2, (came - asked) / 2
