"""asyncio side of the frames: one protocol for Main, Worker, launcher and supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import msgspec

from shardserve.wire.frames import Buffer, FrameError, FrameReader, NoMemory, Payload, control, encode
from shardserve.wire.security import JOIN_LIMIT, Admission, Handshake
from shardserve.wire.segments import Parcel
from shardserve.wire.shared import SharedPath
from shardserve.wire.tls import RECEIVE, TLSSession, chunks

M = TypeVar("M")

logger = logging.getLogger(__name__)


class FrameStream(asyncio.BufferedProtocol, Generic[M]):
    """A connection that calls `on_frame(message, payload)` for each frame and `on_lost(reason)` once at its end.

    A frame that doesn't parse ends the connection at once, as an exception of `on_frame` does; both reach `on_lost`. So
    does one for whose payload there is no memory, unless there is an `on_no_memory(message, error)`.
    `on_made(socket)` is called first and may refuse the connection; then the handshake of the `admission`, if there is
    one, is done (JoinRefused reaches `on_lost` if it fails), and `on_admitted` is called. `unsent` is what the kernel
    hasn't taken yet, in bytes: callers bound their queues with it. share: large payloads go through shared
    memory where the connection is a Unix socket; what comes that way is read-only. relay: what came so on one such
    connection goes on to another without a copy.
    """

    def __init__(
        self,
        union: Any,
        on_frame: Callable[[M, Payload], None],
        on_lost: Callable[[Exception | None], None],
        on_made: Callable[[socket.socket], bool] | None = None,
        admission: Admission | None = None,
        on_admitted: Callable[[], None] | None = None,
        share: bool = False,
        relay: bool = False,
        on_no_memory: Callable[[M, NoMemory], None] | None = None,
    ) -> None:
        self._union = union
        # Made when the other side is admitted: one that isn't must not cost us memory.
        self._reader: FrameReader[M] | None = None
        self._admission = admission
        self._handshake: Handshake | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._tls: TLSSession | None = None
        self._raw = bytearray()
        self._on_frame = on_frame
        self._on_no_memory = on_no_memory
        self._on_lost = on_lost
        self._on_made = on_made
        self._on_admitted = on_admitted
        self._share, self._relay = share, relay
        self._shared: SharedPath | None = None
        self._transport: asyncio.Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._reason: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derive from no class of asyncio.
        connection = transport.get_extra_info("socket")
        if self._on_made is not None and not self._on_made(connection):
            self.abort()
            return
        self._handshake = self._admission.handshake(connection) if self._admission is not None else None
        if self._handshake is None:
            self._admit()
            return
        assert self._admission is not None
        self._raw = bytearray(JOIN_LIMIT)
        self._waiting = asyncio.get_running_loop().call_later(self._admission.timeout, self._waited_enough)
        self._write(self._handshake.start())

    def _waited_enough(self) -> None:
        assert self._admission is not None
        assert self._handshake is not None
        self._end(
            TimeoutError(f"{self._handshake.peer} proved nothing within {self._admission.timeout} s (join_timeout)")
        )
        self.abort()

    def _admit(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        if self._handshake is not None:
            self._tls = self._handshake.tls
            self._handshake = None
            self._raw = bytearray(RECEIVE if self._tls is not None else 0)
        if self._share and self._tls is None and self.peer_socket.family == socket.AF_UNIX:
            self._shared = SharedPath(self._send_control, self._relay)
        self._reader = FrameReader(self._union, shared=self._shared)
        if self._on_admitted is not None:
            self._on_admitted()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._handshake is not None or self._tls is not None:
            return memoryview(self._raw)
        assert self._reader is not None
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._handshake is None and self._tls is None:
            self._take(nbytes)
            return
        received = memoryview(self._raw)[:nbytes]
        if self._handshake is None:
            assert self._tls is not None
            self._tls.feed(received)
        else:
            self._write(self._handshake.received(received))
            if self._handshake.refused is not None:
                self._end(self._handshake.refused)
            if self._reason is not None or not self._handshake.done:
                return
            self._admit()
        if self._tls is not None:
            self._take_decrypted(self._tls)

    def _take_decrypted(self, tls: TLSSession) -> None:
        assert self._reader is not None
        try:
            while self._reason is None and (count := tls.read_into(self._reader.buffer())):
                self._take(count)
        except ssl.SSLError as error:
            self._end(error)
        self._write(tls.outgoing())

    def _take(self, count: int) -> None:
        assert self._reader is not None
        try:
            for message, payload in self._reader.advance(count):
                if not isinstance(payload, NoMemory):
                    self._on_frame(message, payload)
                elif self._on_no_memory is not None:
                    logger.warning("%s came, and %s", type(message).__name__, payload)
                    self._on_no_memory(message, payload)
                else:
                    raise payload
        except (FrameError, NoMemory) as error:
            self._break(error)
        except Exception as error:
            # asyncio would log it and leave a connection that has lost a message.
            logger.exception("a message could not be handled; its connection ends")
            self._break(error)

    def _break(self, reason: Exception) -> None:
        """Not `close`: whoever sends junk may never read what it would wait for."""
        self._reason = reason
        self.abort()

    def _end(self, reason: Exception) -> None:
        self._reason = reason
        self.close()

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None:
            self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._transport = None
        if self._shared is not None:
            self._shared.close()
        self._on_lost(self._reason or exc)

    def _send_control(self, record: bytes) -> None:
        """From any thread: segments are given up by one of their own, and uvloop's transports are for their loop's."""
        if threading.get_ident() != self._thread:
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # The loop has ended.
                self._loop.call_soon_threadsafe(self._send_control, record)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(control(record))

    def send(self, message: msgspec.Struct, buffers: Iterable[Buffer] | Parcel = ()) -> bool:
        """Queues a frame; False if the connection is gone (whoever needs to know hears of it by `on_lost`)."""
        if self._transport is None or self._transport.is_closing():
            return False
        assert self._handshake is None, "nothing is sent before the other side is admitted"
        pieces = encode(message, buffers, self._shared)
        if self._tls is None:
            self._transport.writelines(pieces)
            return True
        for chunk in chunks(pieces):
            self._tls.write(chunk)
            self._transport.write(self._tls.outgoing())
        return True

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def peer_socket(self) -> Any:
        return self._transport.get_extra_info("socket") if self._transport is not None else None

    def close(self) -> None:
        """Ends the connection after what is queued was sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection now."""
        if self._transport is not None:
            self._transport.abort()
