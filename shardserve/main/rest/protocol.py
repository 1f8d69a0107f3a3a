"""uvicorn's HTTP connection with bounds, in time and bytes, for what comes beside bodies and for clients that don't
read; uvicorn has them for idling only."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from shardserve.errors import DeadlineExceeded, InvalidInput, MessageTooLarge, ShardserveError, shortened
from shardserve.main.rest import codec

MAX_HEAD = 1 << 16
"""Bytes of a head, of trailers, or of what is around a body's chunks; and what comes with one read, at most 256 KB,
besides."""

MAX_UNSENT = 1 << 16
"""Bytes of replies that wait for their client; further replies then wait until all of them have left."""

MOST_PIPELINED = 16
"""Requests that wait for the answer to one before them; with more, or with more than MAX_HEAD bytes of bodies, nothing
is read, and a client that leaves is noticed when it is answered."""

MOST_SHOWN = 40


def protocol(timeout: float) -> type[asyncio.Protocol]:
    """What uvicorn.Config takes as `http`; `timeout` in seconds: see RestProtocol."""
    return type(RestProtocol.__name__, (RestProtocol,), {"timeout": timeout})


class RestProtocol(HttpToolsProtocol):
    """Closes a connection whose first request's head isn't complete `timeout` seconds after it was made, or a further
    one's after its first bytes, with 408 if it has begun; the rest of a body that was answered before its end has as
    long as a whole. Between an answer and the next bytes uvicorn's keep-alive ends it; a body under way has RestBody's
    timer. More than MAX_HEAD bytes without any of a body is 431, and the end, too; what isn't HTTP is 400. A client
    that takes nothing of its reply for `timeout` seconds loses its connection."""

    timeout: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._unsent_timer: asyncio.TimerHandle | None = None
        self._inside = ""  # Which part of a message the parser is in: "head", "body", or none.
        self._steps = 0  # How often a message, its body or a piece of it began or ended.
        self._size = 0  # Bytes since the read with the last step.
        self._refused = False  # Nothing more is read.
        self._running: RequestResponseCycle | None = None  # What is being answered.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(MAX_UNSENT, 0)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._unwatch_unsent()
        # uvicorn tells the request that was read last that the client has left, not the one that is being answered.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        steps = self._steps
        self._feed(memoryview(data))
        self._size = self._size + len(data) if steps == self._steps else 0
        if self._size > MAX_HEAD:
            self._refuse(431, MessageTooLarge(f"a request's head or trailers are larger than {MAX_HEAD} bytes"))
        if self._refused or (self.cycle is not None and not self.cycle.response_complete):
            return
        # What came has ended uvicorn's keep-alive timer, and nobody waits for more of it: a head that isn't complete,
        # empty lines before one, or more of a body that was answered before its end.
        if self._timer is None:
            self._watch()

    def _feed(self, data: memoryview) -> None:
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError:  # uvicorn's, for which only the target can be wrong.
            target = shortened(self.url.decode("latin-1"), MOST_SHOWN)
            self._refuse(400, InvalidInput(f"the request's target {target!r} has no path"))
        except httptools.HttpParserError as error:
            self._refuse(400, InvalidInput(f"the request isn't HTTP/1.1: {error}"))

    def _parse(self, data: memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # Its parser takes no body then. A server may ignore the wish (RFC 9110, 7.8), so it reads the head
                # again without it.
                head = self._head_without_upgrade()
                if head is None:
                    self._refuse(400, InvalidInput("CONNECT isn't a method of this server"))
                    return
                data = data[upgrade.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # As uvicorn does.
            self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes | None:
        """Of the head that has been read; None for CONNECT, which is one itself."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            return None
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(fields))

    def on_message_begin(self) -> None:
        self._inside = "head"
        self._steps += 1
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._inside == "head":  # Nobody asks for trailers.
            super().on_header(name, value.strip(b" \t"))  # The parser leaves what follows a value.

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1: it knows no 100.
        super().on_headers_complete()
        self._inside = "body"
        self._steps += 1
        self._unwatch()
        if not self.pipeline:
            self._running = self.cycle
        elif len(self.pipeline) <= MOST_PIPELINED and sum(len(cycle.body) for cycle, _ in self.pipeline) <= MAX_HEAD:
            self.flow.resume_reading()  # Or the end of the connection wouldn't be seen.

    def on_body(self, body: bytes) -> None:
        self._steps += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._inside = ""
        self._steps += 1
        self._unwatch()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_unsent()
        elif self._inside == "head" and self.cycle.response_complete:  # It doesn't idle.
            self._unset_keepalive_if_required()
            self._watch()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def eof_received(self) -> None:
        self._watch_unsent()  # The transport closes itself.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unsent()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_unsent()

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
            self._close()

    def _watch_unsent(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent_timer is None:
            self._unsent_timer = self.loop.call_later(self.timeout, self._on_unsent, unsent)

    def _unwatch_unsent(self) -> None:
        if self._unsent_timer is not None:
            self._unsent_timer.cancel()
            self._unsent_timer = None

    def _on_unsent(self, before: int) -> None:
        self._unsent_timer = None
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch_unsent()

    def _refuse(self, status: int, error: ShardserveError) -> None:
        """Ends the connection, with an answer if the refused request is the one whose answer is next."""
        self._refused = True
        cycle = self.cycle
        owed = cycle is not None and not cycle.response_complete
        if self._inside == "body":
            if not owed:  # It has its answer.
                self._close()
                return
            if not self.pipeline and not cycle.response_started:
                cycle.disconnected = True  # So nobody else answers it.
                cycle.message_event.set()
                owed = False
        if owed:
            cycle.keep_alive = False  # Its answer is the last one.
            return
        body = codec.encode_error(error)
        fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(b"".join((STATUS_LINE[status], fields, body)))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch_unsent()
