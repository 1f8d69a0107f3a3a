"""One generation, seen from inside an agent: its end, and the Worker's answers to what the agent asks in it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from shardserve.wire.messages import Generation, group

WorkerReply = group.FailureNoted | group.StoreReply


class GenerationEnded(Exception):
    """Raised in whatever waits for another process when the generation ends: not an error of the step."""


class Lifetime:
    """Lets the thread that reads the Worker's connection end the waits of all others, and hand them answers."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._lock = threading.Lock()
        self._ended = False
        self._actions: list[Callable[[], None]] = []
        self._answers: queue.SimpleQueue[WorkerReply | None] = queue.SimpleQueue()

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
        self._answers.put(None)
        for action in actions:
            action()

    def answer(self, message: WorkerReply) -> None:
        """From the thread that reads the Worker's connection."""
        self._answers.put(message)

    def await_answer(self, timeout: float | None = None) -> WorkerReply:
        """The answer to the one question that is open. GenerationEnded when the generation ends meanwhile,
        TimeoutError after `timeout` seconds.
        """
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the Worker did not answer within {timeout} s") from None
        if answer is None:
            raise GenerationEnded
        return answer
