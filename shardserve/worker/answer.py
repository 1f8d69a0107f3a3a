"""The answer to a call of the model: a future whose callbacks run at once, not in the loop's next turn.

A request takes two turns of the event loop less that way, each of which is a system call and a pass over what is ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Answer(Generic[T]):
    """Set once, by a result, an error or a cancellation; awaited by at most one coroutine."""

    __slots__ = ("_callbacks", "_cancelled", "_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = False
        self._cancelled = False
        self._result: T | None = None
        self._error: Exception | None = None
        self._callbacks: list[Callable[[Answer[T]], object]] = []

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return self._cancelled

    def result(self) -> T:
        """What it was set to; raises the error, or CancelledError."""
        assert self._done
        if self._cancelled:
            raise asyncio.CancelledError
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def set_result(self, result: T) -> None:
        self._result = result
        self._finish()

    def set_exception(self, error: Exception) -> None:
        self._error = error
        self._finish()

    def cancel(self) -> None:
        """Nobody needs it any more; nothing if it is there."""
        if not self._done:
            self._cancelled = True
            self._finish()

    def _finish(self) -> None:
        assert not self._done
        self._done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[Answer[T]], object]) -> None:
        """To be called with this answer when it is set; it must not raise."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[object, None, T]:
        if not self._done:
            woken = asyncio.get_running_loop().create_future()

            def wake(_: Answer[T]) -> None:
                if not woken.done():
                    woken.set_result(None)

            self.add_done_callback(wake)
            try:
                yield from woken
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self.result()
