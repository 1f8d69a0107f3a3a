"""Clients that keep a transformer busy and check every answer while a test kills processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
from serving import Up, token_ids, transformer_instances, transformer_reference

SECONDS_TO_RECOVER = 5


def kill_at_once(up: Up, pids: list[int]) -> None:
    """Agents: however long this takes, none of them is forked anew, and no group forms, before the last one is dead."""
    server = up.fork_server()
    os.kill(server, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.kill(server, signal.SIGCONT)


class Load:
    """`with Load(up, model) as load`: at its end every answer so far was right, or was one of `allowed_errors`."""

    def __init__(self, up: Up, model: Any, clients: int = 4, allowed_errors: tuple[str, ...] = ()) -> None:
        self._up = up
        self._allowed = allowed_errors
        self._inputs = [token_ids(1, length, seed=length) for length in range(2, 14)]
        self._expected = [transformer_reference(model, ids)[0] for ids in self._inputs]
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._right = [0] * clients
        self.errors: list[str] = []
        self._wrong: list[str] = []
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(clients)]

    def _work(self, number: int) -> None:
        with self._up.client() as client:
            turn = number
            while not self._stop.is_set():
                at = turn % len(self._inputs)
                turn += 1
                self._count(number, at, client.infer(transformer_instances(self._inputs[at]), timeout=30))

    def _count(self, number: int, at: int, reply: Any) -> None:
        error = reply.get("error") if isinstance(reply, dict) else reply[0].get("error")
        with self._progress:
            if error is None:
                if np.abs(reply[0]["logits"] - self._expected[at]).max() > 1e-5:
                    self._wrong.append(f"input {at} was answered wrongly")
                self._right[number] += 1
            elif any(allowed in error for allowed in self._allowed):
                self.errors.append(error)
            else:
                self._wrong.append(error)
            self._progress.notify_all()

    def wait(self, answers: int, seconds: float = 30) -> float:
        """Until every client has got so many more right answers; how long that took."""
        start = time.monotonic()
        with self._progress:
            goals = [right + answers for right in self._right]
            done = self._progress.wait_for(
                lambda: self._wrong or all(r >= goal for r, goal in zip(self._right, goals, strict=True)), seconds
            )
        assert not self._wrong, self._wrong[:3]
        assert done, f"no answers for {seconds} s: {self._right} of {goals}, {self.errors[:3]}"
        return time.monotonic() - start

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait(5)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)
        if exc_info[0] is None:
            assert not self._wrong, self._wrong[:3]
