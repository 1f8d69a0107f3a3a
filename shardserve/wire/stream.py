"""asyncio side of the frames: one protocol for Main, Worker, launcher and supervisor."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import msgspec

from shardserve.wire.frames import MAX_PAYLOAD, Buffer, FrameError, FrameReader, Payload, encode

M = TypeVar("M")

logger = logging.getLogger(__name__)


class FrameStream(asyncio.BufferedProtocol, Generic[M]):
    """A connection that calls `on_frame(message, payload)` for each frame and `on_lost(reason)` once at its end.

    A frame that doesn't parse ends the connection, as an exception of `on_frame` does; both reach `on_lost`.
    `on_made(socket)` is called first and may refuse the connection. `unsent` is what the kernel hasn't taken yet, in
    bytes: callers bound their queues with it.
    """

    def __init__(
        self,
        union: Any,
        on_frame: Callable[[M, Payload], None],
        on_lost: Callable[[Exception | None], None],
        max_payload: int = MAX_PAYLOAD,
        on_made: Callable[[socket.socket], bool] | None = None,
    ) -> None:
        self._reader: FrameReader[M] = FrameReader(union, max_payload)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._reason: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derive from no class of asyncio.
        if self._on_made is not None and not self._on_made(transport.get_extra_info("socket")):
            self.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message, payload in self._reader.advance(nbytes):
                self._on_frame(message, payload)
        except FrameError as error:
            self._reason = error
            self.close()
        except Exception as error:
            # asyncio would log it and leave a connection that has lost a message.
            logger.exception("a message could not be handled; its connection ends")
            self._reason = error
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self._reason or exc)

    def send(self, message: msgspec.Struct, buffers: Iterable[Buffer] = ()) -> bool:
        """Queues a frame; False if the connection is gone (whoever needs to know hears of it by `on_lost`)."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.writelines(encode(message, buffers))
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
