"""Blocking side of the frames, for agents: one thread reads a connection, any thread may write it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from shardserve.wire.frames import Allocate, Buffer, FrameReader, NoMemory, Payload, control, encode
from shardserve.wire.shared import SharedPath
from shardserve.wire.tls import TLSSocket

M = TypeVar("M")

# IOV_MAX of Linux (limits.h): sendmsg refuses more.
MAX_PIECES = 1024


class FrameSocket(Generic[M]):
    """`receive` gives the next frame, `send` returns when the kernel has taken all of one; OSError or EOFError at the
    end of the connection; NoMemory instead of a frame, after which the next can be received. `close` may be called by
    any thread and ends both; the descriptor is closed by the last of the threads inside, so that none of them ever
    reads or writes what has taken over its number. allocate: as in FrameReader."""

    def __init__(
        self,
        connection: socket.socket | TLSSocket,
        union: Any,
        share: bool = False,
        allocate: Allocate | None = None,
    ) -> None:
        self._socket = connection
        self._shared: SharedPath | None = None
        if share and isinstance(connection, socket.socket) and connection.family == socket.AF_UNIX:
            self._shared = SharedPath(self._send_control)
        self._reader: FrameReader[M] = FrameReader(union, shared=self._shared, allocate=allocate)
        self._ready: deque[tuple[M, Payload | NoMemory]] = deque()
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._inside = 0
        self._closed = False

    def receive(self) -> tuple[M, Payload]:
        self._enter()
        try:
            while not self._ready:
                count = self._socket.recv_into(self._reader.buffer())
                if count == 0:
                    raise EOFError("the connection ended")
                self._ready.extend(self._reader.advance(count))
            message, payload = self._ready.popleft()
            if isinstance(payload, NoMemory):
                raise payload
            return message, payload
        finally:
            self._leave()

    def send(self, message: msgspec.Struct, buffers: Iterable[Buffer] = ()) -> None:
        self._send_pieces(encode(message, buffers, self._shared))

    def _send_control(self, record: bytes) -> None:
        self._send_pieces([control(record)])

    def _send_pieces(self, buffers: list[Buffer]) -> None:
        pieces = [memoryview(piece).cast("B") for piece in buffers]
        self._enter()
        try:
            with self._sending:
                self._send(pieces)
        finally:
            self._leave()

    def _send(self, pieces: list[memoryview]) -> None:
        while pieces:
            sent = self._socket.sendmsg(pieces[:MAX_PIECES])
            while pieces and sent >= pieces[0].nbytes:
                sent -= pieces.pop(0).nbytes
            if sent:
                pieces[0] = pieces[0][sent:]

    def take_acceptance(self) -> None:
        """Where nobody calls `receive`: hears whether the other side takes shared memory, if that was asked."""
        if self._shared is None or self._shared.accepted or not self._shared.offered:
            return
        assert isinstance(self._socket, socket.socket)
        self._enter()
        try:
            with contextlib.suppress(BlockingIOError):
                count = self._socket.recv_into(self._reader.buffer(), 0, socket.MSG_DONTWAIT)
                self._ready.extend(self._reader.advance(count))
        finally:
            self._leave()

    def set_timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def close(self) -> None:
        with self._state:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if not self._inside:
                self._socket.close()
        if self._shared is not None:
            self._shared.close()

    def _enter(self) -> None:
        with self._state:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._inside += 1

    def _leave(self) -> None:
        with self._state:
            self._inside -= 1
            if self._closed and not self._inside:
                self._socket.close()
