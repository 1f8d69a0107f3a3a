"""Main and Worker: requests one way, answers and the servable's state the other; and what was recorded of its steps.

Main connects to the Worker's front listener. The Worker sends an `Announce` at once and whenever it changes; after that
Main may send `Infer`. A request is answered once, by `Reply` or `Failed`. Deadlines are readings of CLOCK_MONOTONIC,
which the processes of one host share, in seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shardserve.wire.messages import Generation, Message, TensorMeta
from shardserve.wire.messages.times import RankTimes, ReplicaTimes

Instance = dict[str, TensorMeta]

RankState = Literal["absent", "joined", "serving"]
"""absent: device "" and pid 0. joined: registered, no group yet."""

ReplicaState = Literal["waiting", "forming", "serving", "ending"]
"""waiting: for agents. ending: survivors leave the waits of their generation."""

ServableState = Literal["starting", "ready", "recovering", "stopping", "failed"]
"""starting: never ready so far. recovering: was ready, no replica serves now."""


class Infer(Message, frozen=True):
    """Payload: the tensors of the instances in order, those of one instance in the order of its keys.

    places: which instances of the client's request these are, for errors that name one; None for all of them."""

    request: int
    method: str
    instances: list[Instance]
    deadline: float | None
    places: tuple[int, ...] | None = None


class Cancel(Message, frozen=True):
    """The client is gone: the request needs no answer."""

    request: int


class InstanceError(Message, frozen=True):
    """Why one instance has no outputs. error: a class name of shardserve.errors."""

    error: str
    message: str


class InstanceOutputs(Message, frozen=True):
    outputs: Instance


class Reply(Message, frozen=True):
    """One result per instance, in the request's order; payload as in `Infer`, failed instances have none."""

    request: int
    results: list[InstanceOutputs | InstanceError]


class Failed(Message, frozen=True):
    """The request as a whole has no answer. error: a class name of shardserve.errors."""

    request: int
    error: str
    message: str


class MethodInfo(msgspec.Struct, frozen=True, array_like=True):
    """dtypes: input name to dtype, for the inputs whose dtype the servable knows; REST converts JSON numbers to it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: dict[str, str] = {}


class RankStatus(msgspec.Struct, frozen=True, array_like=True):
    rank: int
    stage: int
    host: str
    device: str
    pid: int
    state: RankState


class ReplicaStatus(msgspec.Struct, frozen=True, array_like=True):
    """restarts: generations that ended since the Worker started; dropped: frames since then that came from an agent in
    another generation, as of the last change of anything else. reason: why it won't be complete before an operator has
    done something, or ""."""

    replica: int
    generation: Generation
    state: ReplicaState
    restarts: int
    ranks: tuple[RankStatus, ...]
    dropped: int = 0
    reason: str = ""


class Announce(Message, frozen=True):
    """The whole truth about the Worker's servable, sent again whenever any of it changes."""

    name: str
    version: int
    state: ServableState
    reason: str
    rank_size: int
    stage_size: int
    methods: dict[str, MethodInfo]
    replicas: tuple[ReplicaStatus, ...]


class AskTimeline(Message, frozen=True):
    """Answered by a `ReplicaTimeline` for each replica, a `RankTimeline` for each rank that is there, and then
    `TimelineEnd`. Requests have numbers of their own. deadline: for all of that; ranks have half of the time until
    then, so that what others have told still comes in time."""

    request: int
    deadline: float


class ReplicaTimeline(Message, frozen=True):
    request: int
    replica: int
    times: ReplicaTimes


class RankTimeline(Message, frozen=True):
    """offset: how far the rank's clock is ahead of the Worker's, in seconds; error: by how much that may be wrong; both
    0 on one host, which has one clock."""

    request: int
    replica: int
    rank: int
    stage: int
    host: str
    device: str
    pid: int
    offset: float
    error: float
    times: RankTimes


class TimelineEnd(Message, frozen=True):
    """capacity: of how many steps times are kept. now: the Worker's clock. missing: ranks that did not answer."""

    request: int
    capacity: int
    now: float
    missing: tuple[int, ...]


ToWorker = Infer | Cancel | AskTimeline
ToMain = Reply | Failed | Announce | ReplicaTimeline | RankTimeline | TimelineEnd
