"""Blocking side of the frames, for agents: one thread reads a connection, any thread may write it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from shardserve.wire.frames import Buffer, FrameReader, Payload, encode
from shardserve.wire.tls import TLSSocket

M = TypeVar("M")

# IOV_MAX of Linux (limits.h): sendmsg refuses more.
MAX_PIECES = 1024


class FrameSocket(Generic[M]):
    """`receive` gives the next frame, `send` returns when the kernel has taken all of one; OSError or EOFError at the
    end of the connection. `close` may be called by any thread and ends both."""

    def __init__(self, connection: socket.socket | TLSSocket, union: Any) -> None:
        self._socket = connection
        self._reader: FrameReader[M] = FrameReader(union)
        self._ready: deque[tuple[M, Payload]] = deque()
        self._sending = threading.Lock()

    def receive(self) -> tuple[M, Payload]:
        while not self._ready:
            count = self._socket.recv_into(self._reader.buffer())
            if count == 0:
                raise EOFError("the connection ended")
            self._ready.extend(self._reader.advance(count))
        return self._ready.popleft()

    def send(self, message: msgspec.Struct, buffers: Iterable[Buffer] = ()) -> None:
        pieces = [memoryview(piece).cast("B") for piece in encode(message, buffers)]
        with self._sending:
            while pieces:
                sent = self._socket.sendmsg(pieces[:MAX_PIECES])
                while pieces and sent >= pieces[0].nbytes:
                    sent -= pieces.pop(0).nbytes
                if sent:
                    pieces[0] = pieces[0][sent:]

    def set_timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
