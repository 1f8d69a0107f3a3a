"""When this rank's last steps came, ran and ended: recorded in memory, sent only when somebody asks."""

from __future__ import annotations

from collections import deque

from shardserve.wire.messages import Generation
from shardserve.wire.messages.times import RankTimes, StepNames

Record = tuple[Generation, int, float, float, float, float]
"""A step's generation and number, when it was received, ready, started and finished (see RankTimes)."""


class Timeline:
    """The last `capacity` steps. One thread records, any may read."""

    def __init__(self, capacity: int) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)
        # No function of ours in between: it would take as long as the recording.
        self.record = self._records.append

    def times(self) -> RankTimes:
        # `copy` is one call that lets no other thread run in between; iterating would see the ring change.
        records = self._records.copy()
        names = StepNames([r[0].incarnation for r in records], [r[0].counter for r in records], [r[1] for r in records])
        return RankTimes(
            names,
            received=[r[2] for r in records],
            ready=[r[3] for r in records],
            started=[r[4] for r in records],
            finished=[r[5] for r in records],
        )
