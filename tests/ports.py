"""Ports of 127.0.0.1 that nobody has, and that nobody takes before the test does."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator

BLOCK = 32
# Below those that Linux gives by itself: an outgoing connection of any process would take one meanwhile.
FIRST, END = 20_000, 32_768


def _starts() -> Iterator[int]:
    """Where blocks begin that, of tests that run several at a time, only this run of them takes: each as late again as
    can be."""
    run = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    runs = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    starts = range(FIRST + run * BLOCK, END - BLOCK + 1, runs * BLOCK)
    return itertools.cycle(random.sample(starts, len(starts)))


_remaining = _starts()


def free_ports(count: int) -> list[int]:
    """At most 32, in a row, no two calls the same."""
    assert count <= BLOCK
    while True:
        start = next(_remaining)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(start, start + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(start, start + count))


def free_port() -> int:
    return free_ports(1)[0]
