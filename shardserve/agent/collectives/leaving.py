"""The end of an agent that can't leave a wait which nothing ends from outside."""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType

from shardserve.agent.lifetime import Lifetime

logger = logging.getLogger(__name__)


class LeaveInTime:
    """`with` it around such a wait, in one thread at a time. An agent that is still inside `timeout` seconds after the
    end of its generation ends itself: the Worker that would have it killed may be unreachable.

    what: where it may be blocked, for the log.
    """

    def __init__(self, what: str, lifetime: Lifetime, timeout: float) -> None:
        self._what = what
        self._timeout = timeout
        self._inside = False
        lifetime.on_end(self._watch)

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside = False

    def _watch(self) -> None:
        timer = threading.Timer(self._timeout, self._check)
        timer.daemon = True
        timer.start()

    def _check(self) -> None:
        if self._inside:
            logger.warning("an agent ends: it is blocked in %s after the end of its generation", self._what)
            os._exit(1)
