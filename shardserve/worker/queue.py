"""Calls that wait for a step, and which of them go into the next one."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import attrgetter

from shardserve.errors import DeadlineExceeded
from shardserve.worker.batching import Batching, Call, Key

Kind = tuple[int, Key]
"""A call's subgraph and key: calls of one kind may share a batch."""

_by_urgency = attrgetter("urgency")


class CallQueue:
    """Nearer deadlines first (see `Call.urgency`), and before them all the calls that have to run alone.

    The most urgent call decides of which kind the next batch is; the others of its kind fill it, wherever they stand.
    Where the model has a `max_batch_delay_ms`, a kind waits until it fills a batch or the delay of one of its calls is
    over.
    """

    def __init__(self) -> None:
        self._alone: OrderedDict[Call, None] = OrderedDict()
        self._kinds: dict[Kind, list[Call]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._alone) + self._waiting

    def __iter__(self) -> Iterator[Call]:
        """All of them, as a copy."""
        return iter([*self._alone, *(call for calls in self._kinds.values() for call in calls)])

    def add(self, call: Call) -> None:
        """A call with `alone` goes to the front of those that have it."""
        if call.alone:
            self._alone[call] = None
            self._alone.move_to_end(call, last=False)
            return
        insort(self._kinds.setdefault((call.subgraph, call.key), []), call, key=_by_urgency)
        self._waiting += 1

    def discard(self, call: Call) -> None:
        """Takes a call out, if it waits here."""
        if call.alone:
            self._alone.pop(call, None)
            return
        kind = (call.subgraph, call.key)
        calls = self._kinds.get(kind, [])
        at = bisect_left(calls, call.urgency, key=_by_urgency)
        if at < len(calls) and calls[at] is call:
            del calls[at]
            self._waiting -= 1
            if not calls:
                del self._kinds[kind]

    def take(self, batchings: Sequence[Batching], idle: bool) -> list[Call]:
        """The next batch's calls; none if all have to wait still. idle: whether its group has nothing under way, as a
        call that runs alone needs.
        """
        now = time.monotonic()
        for call in list(self._alone):
            if self._is_over(call, now):
                continue
            if not idle:
                return []
            del self._alone[call]
            return [call]
        for kind in sorted(self._kinds, key=lambda kind: self._kinds[kind][0].urgency):
            batching = batchings[kind[0]]
            self._drop_late(self._kinds.get(kind, []), now)
            while kind in self._kinds and self._is_ready(self._kinds[kind], batching, now):
                # A client may have left so lately that the call is here still.
                calls = [call for call in self._choose(kind, batching) if not call.answer.done()]
                if calls:
                    return calls
        return []

    @staticmethod
    def _is_ready(calls: Sequence[Call], batching: Batching, now: float) -> bool:
        return len(calls) >= batching.largest(calls[0]) or _held_until(calls) <= now

    def _choose(self, kind: Kind, batching: Batching) -> list[Call]:
        calls = self._kinds[kind]
        chosen = batching.choose(calls)
        if len(chosen) == len(calls):
            del self._kinds[kind]
        else:
            gone = set(chosen)
            self._kinds[kind] = [call for call in calls if call not in gone]
        self._waiting -= len(chosen)
        return chosen

    def _drop_late(self, calls: list[Call], now: float) -> None:
        # Whose deadline has passed stands in front: nothing is more urgent.
        for call in [*takewhile(lambda call: call.urgency[0] <= now, calls)]:
            self._is_over(call, now)

    @property
    def ready_at(self) -> float | None:
        """When the first delay is over, on CLOCK_MONOTONIC; None if nothing waits for that."""
        if self._alone:
            return None
        return min(map(_held_until, self._kinds.values()), default=None)

    def _is_over(self, call: Call, now: float) -> bool:
        """Whether it is answered or its deadline has passed: then it is answered, and gone from here."""
        if not call.answer.done() and (call.deadline is None or call.deadline > now):
            return False
        self.discard(call)
        call.fail(DeadlineExceeded("the deadline passed while the request waited for its step"))
        return True

    def drain(self) -> list[Call]:
        """Takes all out."""
        calls = list(self)
        self._alone.clear()
        self._kinds.clear()
        self._waiting = 0
        return calls


def _held_until(calls: Sequence[Call]) -> float:
    return min(call.held_until for call in calls)
