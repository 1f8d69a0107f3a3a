"""How often something that died is started again: one policy for Main and its JSON process, Workers and their
processes of Python stages, fork servers and agents."""

from __future__ import annotations

import time
from collections import deque

from shardserve.settings import Settings

# A first death is nobody's habit: it is made good at once. From the fourth in a window on, each waits twice as long.
PROMPT_RESTARTS = 3
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


class RestartBudget:
    """The deaths of one thing within the last `restart_window`; more than `max_restarts` of them are too many."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._deaths: deque[float] = deque()

    def spend(self) -> bool:
        """Counts a death; False if it was one too many."""
        self._deaths.append(time.monotonic())
        return not self.spent

    @property
    def spent(self) -> bool:
        """Whether there were too many; not any more when enough of them are out of the window."""
        while self._deaths and self._deaths[0] < time.monotonic() - self._settings.restart_window:
            self._deaths.popleft()
        return len(self._deaths) > self._settings.max_restarts

    def forgive(self) -> None:
        """A death turned out to be a request's fault, not of what died."""
        if self._deaths:
            # Drops the newest: the older ones leave the window sooner.
            self._deaths.pop()

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start."""
        extra = len(self._deaths) - PROMPT_RESTARTS
        if extra <= 0:
            return 0.0
        # In a long window there may be so many that 2 ** them is no float.
        return min(FIRST_PAUSE * 2.0 ** min(extra - 1, 10), LONGEST_PAUSE)

    def __str__(self) -> str:
        return f"{len(self._deaths)} times within {self._settings.restart_window:g} s"
