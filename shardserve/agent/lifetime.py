"""The end of a generation, seen from inside an agent."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shardserve.wire.messages import Generation


class GenerationEnded(Exception):
    """Raised in whatever waits for another rank when the generation ends: not an error of the step."""


class Lifetime:
    """Lets the thread that reads the Worker's connection end the waits of all others."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._lock = threading.Lock()
        self._ended = False
        self._actions: list[Callable[[], None]] = []

    @property
    def ended(self) -> bool:
        return self._ended

    def on_end(self, action: Callable[[], None]) -> None:
        """Has `action` called once when the generation ends, in the thread that ends it; at once if it has ended."""
        with self._lock:
            if not self._ended:
                self._actions.append(action)
                return
        action()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            actions, self._actions = self._actions, []
        for action in actions:
            action()
