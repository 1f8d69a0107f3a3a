"""When steps were where: what the Worker and its agents have recorded, oldest first, by columns.

Columns, because thousands of rows are encoded, passed on and decoded by processes that serve meanwhile. Times are
readings of CLOCK_MONOTONIC, in seconds, of the host of whoever recorded them. (generation, step) names a step.
"""

from __future__ import annotations

import msgspec


class StepNames(msgspec.Struct, frozen=True, array_like=True):
    """Each step's generation (incarnations, counters) and its number in it."""

    incarnations: list[int]
    counters: list[int]
    steps: list[int]


class RankTimes(msgspec.Struct, frozen=True, array_like=True):
    """The steps that a rank has run to their end.

    received: the step's header was there. ready: so was its input (the first pipeline stage's comes with the header).
    started and finished: the shard's graph ran; what it sends leaves afterwards."""

    names: StepNames
    received: list[float]
    ready: list[float]
    started: list[float]
    finished: list[float]


class ReplicaTimes(msgspec.Struct, frozen=True, array_like=True):
    """The steps that the Worker has sent to a group and that have ended.

    instances: in the batch. forms: each step's place in `dims`, the dims of its header. queued: the oldest of its calls
    began to wait. sent: to the agents. answered: by the last pipeline stage, or cut short with its generation, as
    `ended` has it. failed: the model raised."""

    names: StepNames
    subgraphs: list[int]
    instances: list[int]
    forms: list[int]
    dims: list[dict[str, int]]
    queued: list[float]
    sent: list[float]
    answered: list[float]
    failed: list[bool]
    ended: list[bool]
