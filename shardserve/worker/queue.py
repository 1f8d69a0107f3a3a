"""Calls that wait for a step, and which of them go into the next one."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import attrgetter

from shardserve.worker.batching import Batching
from shardserve.worker.calls import Call, Key

Kind = tuple[int, int, Key]
"""A call's subgraph, unit and key: calls of one kind may share a batch."""

Urgency = tuple[float, int]
"""As `Call.urgency`."""

_by_urgency = attrgetter("urgency")


class CallQueue:
    """Nearer deadlines first (see `Call.urgency`). Suspects, under which a generation ended, are a queue of their own.

    The most urgent call decides of which kind the next batch is; the others of its kind fill it, wherever they stand.
    Where the model has a `max_batch_delay_ms`, a kind waits until it fills a batch or the delay of one of its calls is
    over.
    """

    def __init__(self) -> None:
        self._kinds: dict[Kind, list[Call]] = {}
        self._suspects: dict[Kind, list[Call]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Call]:
        """All of them, as a copy."""
        return iter([call for kinds in (self._suspects, self._kinds) for calls in kinds.values() for call in calls])

    def _place(self, call: Call) -> tuple[dict[Kind, list[Call]], Kind]:
        return self._suspects if call.endings else self._kinds, (call.subgraph, call.unit, call.key)

    def add(self, call: Call) -> None:
        kinds, kind = self._place(call)
        insort(kinds.setdefault(kind, []), call, key=_by_urgency)
        self._waiting += 1

    def discard(self, call: Call) -> bool:
        """Takes a call out, if it waits here; whether it did."""
        kinds, kind = self._place(call)
        calls = kinds.get(kind, [])
        at = bisect_left(calls, call.urgency, key=_by_urgency)
        if at < len(calls) and calls[at] is call:
            del calls[at]
            self._waiting -= 1
            if not calls:
                del kinds[kind]
            return True
        return False

    @property
    def next_suspect(self) -> Urgency | None:
        """That of the most urgent suspect, if any waits."""
        return min((calls[0].urgency for calls in self._suspects.values()), default=None)

    def take_suspects(self, batchings: Sequence[Batching]) -> list[Call]:
        """The next batch of suspects."""
        return self._take(self._suspects, batchings)

    def take(self, batchings: Sequence[Batching], before: Urgency | None = None) -> list[Call]:
        """The next batch of the others; none if all have to wait still. before: only what is more urgent."""
        return self._take(self._kinds, batchings, before)

    def _take(
        self, kinds: dict[Kind, list[Call]], batchings: Sequence[Batching], before: Urgency | None = None
    ) -> list[Call]:
        now = time.monotonic()
        for kind in sorted(kinds, key=lambda kind: kinds[kind][0].urgency):
            batching = batchings[kind[0]]
            # A call that is dropped may take along others, of any kind: those of its request.
            self._drop_late(kinds.get(kind, []), now)
            if kind in kinds and self._is_ready(kinds[kind], batching, now):
                if before is not None and kinds[kind][0].urgency > before:
                    return []
                return self._choose(kinds, kind, batching)
        return []

    @staticmethod
    def _is_ready(calls: Sequence[Call], batching: Batching, now: float) -> bool:
        return len(calls) >= batching.largest(calls[0]) or _held_until(calls) <= now

    def _choose(self, kinds: dict[Kind, list[Call]], kind: Kind, batching: Batching) -> list[Call]:
        calls = kinds[kind]
        chosen = batching.choose(calls)
        if len(chosen) == len(calls):
            del kinds[kind]
        else:
            gone = set(chosen)
            kinds[kind] = [call for call in calls if call not in gone]
        self._waiting -= len(chosen)
        return chosen

    def _drop_late(self, calls: list[Call], now: float) -> None:
        # Whose deadline has passed stands in front: nothing is more urgent.
        for call in [*takewhile(lambda call: call.urgency[0] <= now, calls)]:
            if call.deadline is not None:
                # Answered before it is taken out: callbacks of the answer look for the call in this queue.
                call.expire(now)
                self.discard(call)

    @property
    def ready_at(self) -> float | None:
        """When the first delay is over, on CLOCK_MONOTONIC; None if nothing waits for that."""
        return min(map(_held_until, self._kinds.values()), default=None)

    def drain(self) -> list[Call]:
        """Takes all out."""
        calls = list(self)
        self._suspects.clear()
        self._kinds.clear()
        self._waiting = 0
        return calls


def _held_until(calls: Sequence[Call]) -> float:
    return min(call.held_until for call in calls)
