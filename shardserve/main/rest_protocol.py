"""uvicorn's HTTP connection with bounds for a request's head, in time and bytes; uvicorn has them for idling only."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from shardserve.errors import DeadlineExceeded, MessageTooLarge, ShardserveError
from shardserve.main import rest_codec

MAX_HEAD = 1 << 16
"""Bytes; and what comes with one read, at most 256 KB, besides."""


def protocol(timeout: float) -> type[asyncio.Protocol]:
    """What uvicorn.Config takes as `http`; `timeout` in seconds: see RestProtocol."""
    return type(RestProtocol.__name__, (RestProtocol,), {"timeout": timeout})


class RestProtocol(HttpToolsProtocol):
    """Closes a connection whose first request's head isn't complete `timeout` seconds after it was made, or a further
    one's after its first bytes, with 408 if it has begun. Between an answer and the next bytes uvicorn's keep-alive
    ends it; a body under way has RestBody's timer. A head of more than MAX_HEAD bytes is 431, and the end, too."""

    timeout: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._inside = ""  # Which part of a message the parser is in: "head", "body", or none.
        self._size = 0  # Of the head, without what came with its first bytes.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._inside
        super().data_received(data)
        if before == self._inside == "head":
            self._size += len(data)
            if self._size > MAX_HEAD:
                self._refuse(431, MessageTooLarge(f"the head of a request is larger than {MAX_HEAD} bytes"))
                return
        if self.cycle is not None and not self.cycle.response_complete:
            return
        # What came has ended uvicorn's keep-alive timer, and nobody waits for more of it: a head that isn't complete,
        # empty lines before one, or more of a body that was answered before its end, each piece of which has its time.
        if self._inside == "body":
            self._unwatch()
        if self._timer is None:
            self._watch()

    def on_message_begin(self) -> None:
        self._inside = "head"
        self._size = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._inside = "body"
        self._unwatch()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._inside = ""
        super().on_message_complete()

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self.timeout, self._on_timeout)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self._inside == "head":
            self._refuse(
                408, DeadlineExceeded(f"waited {self.timeout:g} s (receive_timeout) for the head of a request")
            )
        else:
            self.transport.close()

    def _refuse(self, status: int, error: ShardserveError) -> None:
        if self.transport.is_closing():
            return
        body = rest_codec.encode_error(error)
        fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(b"".join((STATUS_LINE[status], fields, body)))
        self.transport.close()
