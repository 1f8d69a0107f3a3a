"""The body of a REST request while it comes: how large it may be, how long it may take, and how long it may stall."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from shardserve.errors import DeadlineExceeded, MessageTooLarge


class Stalled(DeadlineExceeded):
    """Nothing more of a body came for receive_timeout: whoever sends it may be gone, so its connection is closed."""


class RestBody:
    """`receive` gives its pieces; once."""

    def __init__(self, request: Request, limit: int, came: Callable[[int], None]) -> None:
        """limit: in bytes. came: told the size of each piece, and may raise."""
        self._request = request
        self._limit = limit
        self._came = came
        self._size = 0
        self._began = self._since = time.monotonic()
        self._late: DeadlineExceeded | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self, timeout: float, deadline: float | None) -> list[bytes]:
        """MessageTooLarge over the limit; Stalled after `timeout` seconds without more of it; DeadlineExceeded at
        `deadline`, a reading of time.monotonic(); ClientDisconnect if the client leaves."""
        if (late := self._too_late(timeout, deadline)) is not None:
            raise late
        task = asyncio.current_task()
        assert task is not None
        self._watch(task, timeout, deadline)
        try:
            return await self._read()
        except asyncio.CancelledError:
            if self._late is None:
                raise
            raise self._late from None
        finally:
            assert self._timer is not None
            self._timer.cancel()

    def _watch(self, task: asyncio.Task[Any], timeout: float, deadline: float | None) -> None:
        """Cancels the task, which is inside `receive`, when it is too late. To wait for a task of its own instead would
        cost a small request a tenth of its time."""
        self._late = self._too_late(timeout, deadline)
        if self._late is not None:
            task.cancel()
            return
        end = self._since + timeout
        wait = (end if deadline is None else min(end, deadline)) - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, wait), self._watch, task, timeout, deadline)

    def _too_late(self, timeout: float, deadline: float | None) -> DeadlineExceeded | None:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return DeadlineExceeded(f"waited {now - self._began:.3f} s for the body to come; {self._so_far}")
        if now >= self._since + timeout:
            return Stalled(f"waited {timeout:g} s (receive_timeout) for more of the body; {self._so_far}")
        return None

    @property
    def _so_far(self) -> str:
        length = self._request.headers.get("content-length")
        return f"{self._size} bytes{f' of {length}' if length is not None else ''} came"

    async def _read(self) -> list[bytes]:
        too_large = MessageTooLarge(f"the body is larger than {self._limit} bytes, this server's max_msg_mb_size")
        length = self._request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            raise too_large
        pieces: list[bytes] = []
        async for piece in self._request.stream():
            self._since = time.monotonic()
            self._size += len(piece)
            if self._size > self._limit:
                raise too_large
            self._came(len(piece))
            pieces.append(piece)
        return pieces
