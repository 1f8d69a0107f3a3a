"""A call of the model, the batch that it shares a step with, and the ends of generations that it was under."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shardserve.errors import DeadlineExceeded, ShardserveError
from shardserve.worker.answer import Answer
from shardserve.worker.padding import Lengths

if TYPE_CHECKING:
    from shardserve.worker.sessions import Session

Array = npt.NDArray[np.generic]
Key = tuple[object, ...]

# A call without a deadline is as urgent as one that has so many seconds: it is overtaken, but not for ever.
PATIENCE = 60.0

_numbers = count()


class Ending:
    """Of a generation, and the deaths that belong to it: what kills one rank mostly kills others, and a rank that hangs
    is killed some time after. `forgive_death(rank)` is called for each, also for those that are still to come, if it
    turns out to be a request's fault.

    suspects: how many of the calls that were under way haven't been left by their clients before they ran again; None
    if they weren't one batch.
    """

    def __init__(self, forgive_death: Callable[[int], None]) -> None:
        self.suspects: int | None = None
        self._forgive_death = forgive_death
        self._forgiven = False
        self._dead: list[int] = []

    def died(self, rank: int) -> None:
        if self._forgiven:
            self._forgive_death(rank)
        else:
            self._dead.append(rank)

    def forgive(self) -> None:
        self._forgiven = True
        dead, self._dead = self._dead, []
        for rank in dead:
            self._forgive_death(rank)


@dataclass(eq=False)
class Call:
    """One instance's run through the model. arrays: in the order of the signature's inputs, without the batch dim.

    deadline: on CLOCK_MONOTONIC, in seconds. subgraph: which of the agents' programs runs it. session: the method call
    of a stateful servable that it belongs to. begins: it is that one's first step. endings: of generations, while
    it was in one of their steps; with any it is a suspect. unit: calls that run again share their batch only with those
    of the same number. lengths: its sizes of the dims that are padded. urgency: the smallest goes first. held_until:
    when it no longer waits for others to share its batch.
    """

    arrays: tuple[Array, ...]
    key: Key
    deadline: float | None
    answer: Answer[tuple[Array, ...]]
    subgraph: int = 0
    session: Session | None = None
    begins: bool = False
    endings: list[Ending] = field(default_factory=list)
    unit: int = 0
    lengths: Lengths = ()
    arrived: float = field(default_factory=time.monotonic)
    urgency: tuple[float, int] = field(init=False)
    held_until: float = field(init=False)

    def __post_init__(self) -> None:
        self.urgency = (self.arrived + PATIENCE if self.deadline is None else self.deadline, next(_numbers))
        self.held_until = self.arrived

    def fail(self, error: ShardserveError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def expire(self, now: float) -> None:
        """Its deadline has passed before it had a step."""
        waited = now - self.arrived
        self.fail(DeadlineExceeded(f"the deadline passed while the request waited for its step ({waited:.3f} s)"))


@dataclass(frozen=True)
class Batch:
    """arrays: the model's inputs, C-contiguous. dims: the sizes of the signature's dynamic dims in this step. subgraph:
    that of all its calls. reset: the agents' state is first as it was when they loaded it. suspect: a generation ended
    under its calls."""

    calls: tuple[Call, ...]
    arrays: tuple[Array, ...]
    dims: dict[str, int]
    subgraph: int = 0
    reset: bool = False
    suspect: bool = False
