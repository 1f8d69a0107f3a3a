"""The frame layout of every stream between our processes, and the parser that blocking and asyncio readers share.

A frame is a 12-byte prefix (little-endian: header length u32, payload length u64), a msgpack header that decodes to one
message of the link's union, and the raw bytes of that message's tensors, each padded to `ALIGNMENT`. The two highest
bits of the payload's length say whether it is the payload, or where it lies in shared memory, or, without a header, a
control record of that (see wire/shared.py). The transport resends nothing: a connection that ends, ends with whatever
was under way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shardserve.errors import MessageTooLarge
from shardserve.wire.segments import Parcel
from shardserve.wire.shared import SMALLEST, SharedError, SharedPath

PREFIX = struct.Struct("<IQ")
ALIGNMENT = 64
MAX_HEADER = 64 << 20
MAX_PAYLOAD = 64 << 30
SCRATCH = 64 << 10
KIND_SHIFT = 62
SHARED, CONTROL = 1 << KIND_SHIFT, 2 << KIND_SHIFT
LENGTH = SHARED - 1

Payload = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview
Allocate = Callable[[int], Payload]
"""Memory of so many bytes for a payload."""
M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_PADDING = bytes(ALIGNMENT)


class FrameError(Exception):
    """The other side sent what isn't a frame of this link; the connection can't be used any further."""


class NoMemory(MemoryError):
    """A message came, and there was no memory for its payload, which was dropped; the connection goes on."""

    def __init__(self, message: Any, reason: str) -> None:
        super().__init__(reason)
        self.message = message


def padded(size: int) -> int:
    """`size` rounded up to the alignment that each tensor of a payload has."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode(
    message: msgspec.Struct, buffers: Iterable[Buffer] | Parcel = (), shared: SharedPath | None = None
) -> list[Buffer]:
    """The pieces of one frame, to be written in order; the buffers themselves are not copied, unless they are so large
    that they go through `shared` memory.

    MessageTooLarge for one over the limits: the other side would end the connection, and all that is under way on it.
    """
    pieces: list[Buffer] = [b""]
    payload = 0
    given = [*buffers]
    for buffer in given:
        size = buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        if size:
            pieces.append(buffer)
        gap = padded(size) - size
        if gap:
            pieces.append(_PADDING[:gap])
        payload += size + gap
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER or payload > MAX_PAYLOAD:
        raise MessageTooLarge(
            f"tensors of {payload} bytes, described by {len(header)} bytes of names, shapes and lengths of strings, "
            f"are more than one message of a connection takes ({MAX_PAYLOAD} and {MAX_HEADER} bytes)"
        )
    if shared is not None and payload >= SMALLEST and shared.ready():
        place = shared.place_relayed(given, payload, ALIGNMENT)
        if place is None:
            place = _place(shared, buffers if isinstance(buffers, Parcel) else None, pieces[1:], payload)
        if place is not None:
            return [PREFIX.pack(len(header), SHARED | len(place)) + header + place]
    pieces[0] = PREFIX.pack(len(header), payload) + header
    return pieces


def _place(shared: SharedPath, parcel: Parcel | None, pieces: list[Buffer], size: int) -> bytes | None:
    def fill(memory: Payload) -> None:
        at = 0
        for piece in pieces:
            part = np.frombuffer(piece, np.uint8)
            memory[at : at + len(part)] = part
            at += len(part)

    if parcel is not None:
        return shared.place(parcel, size, fill)
    with Parcel(pieces) as alone:
        return shared.place(alone, size, fill)


def control(record: bytes) -> bytes:
    """The frame of a control record of shared memory."""
    return PREFIX.pack(0, CONTROL | len(record)) + record


def split(payload: Payload, sizes: Sequence[int]) -> list[Payload]:
    """Views of the tensors in a payload, given their sizes in bytes; FrameError if they don't fill it."""
    views = []
    offset = 0
    for size in sizes:
        views.append(payload[offset : offset + size])
        offset += padded(size)
    if offset != len(payload):
        raise FrameError(f"a payload of {len(payload)} bytes came where the header says {offset}")
    return views


class FrameReader(Generic[M]):
    """Turns received bytes into (message, payload) pairs; does no input or output itself.

    `buffer()` is where the next bytes belong, `advance(n)` says that n came. A payload gets memory of its own, into
    which whatever is not yet here is received directly. allocate: gives that memory, of payloads that aren't empty or
    in shared memory. A payload for which there is none is read and dropped, and NoMemory comes in its place.
    """

    def __init__(
        self,
        union: Any,
        max_payload: int = MAX_PAYLOAD,
        max_header: int = MAX_HEADER,
        shared: SharedPath | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._max_payload = max_payload
        self._max_header = max_header
        self._scratch = bytearray(min(SCRATCH, PREFIX.size + max_header))
        self._start = 0
        self._end = 0
        self._message: M | None = None
        # None while it is dropped.
        self._payload: Payload | None = None
        self._size = 0
        self._left = 0
        self._shared = shared
        self._allocate = allocate
        self._kind = 0

    def buffer(self) -> memoryview:
        if self._left:
            if self._payload is None:
                return memoryview(self._scratch)[: self._left]
            return self._payload.data[-self._left :]
        if self._end == len(self._scratch):
            self._make_room(self._end - self._start + 1)
        return memoryview(self._scratch)[self._end :]

    def advance(self, count: int) -> list[tuple[M, Payload | NoMemory]]:
        frames: list[tuple[M, Payload | NoMemory]] = []
        if self._left:
            self._left -= count
            if not self._left:
                self._finish(frames)
            return frames
        self._end += count
        while self._parse(frames):
            pass
        return frames

    def _parse(self, frames: list[tuple[M, Payload | NoMemory]]) -> bool:
        """Takes the next frame, if all of it is here."""
        held = self._end - self._start
        if held < PREFIX.size:
            return False
        header_size, length = PREFIX.unpack_from(self._scratch, self._start)
        payload_size, self._kind = length & LENGTH, length & ~LENGTH
        if self._kind and self._shared is None:
            raise FrameError("a frame of shared memory, on a connection that has none")
        if header_size > self._max_header or payload_size > self._max_payload:
            raise FrameError(f"a frame of {header_size} + {payload_size} bytes is over the limit of this connection")
        if held < PREFIX.size + header_size:
            self._make_room(PREFIX.size + header_size)
            return False
        at = self._start + PREFIX.size
        if self._kind != CONTROL:
            try:
                self._message = self._decoder.decode(memoryview(self._scratch)[at : at + header_size])
            except msgspec.DecodeError as error:
                raise FrameError(f"a header that is no message of this connection: {error}") from error
        at += header_size
        here = min(payload_size, self._end - at)
        self._payload = self._memory(payload_size)
        if self._payload is not None:
            self._payload[:here] = np.frombuffer(self._scratch, np.uint8, here, at)
        self._size, self._left = payload_size, payload_size - here
        self._start = at + here
        if self._start == self._end:
            self._start = self._end = 0
        if self._left:
            return False
        self._finish(frames)
        return True

    def _memory(self, size: int) -> Payload | None:
        try:
            if self._allocate is None or self._kind or not size:
                return np.empty(size, np.uint8)
            return self._allocate(size)
        except MemoryError:
            return None

    def _finish(self, frames: list[tuple[M, Payload | NoMemory]]) -> None:
        message, kind = self._message, self._kind
        payload: Payload | NoMemory = (
            NoMemory(message, f"no memory for {self._size} bytes") if self._payload is None else self._payload
        )
        self._message = self._payload = None
        if kind:
            assert self._shared is not None
            if isinstance(payload, NoMemory):  # Of some bytes.
                raise payload
            try:
                if kind == CONTROL:
                    self._shared.control(payload.tobytes())
                    return
                payload = self._shared.payload(payload.tobytes(), self._max_payload)
            except SharedError as error:
                raise FrameError(str(error)) from error
            except MemoryError as error:
                payload = NoMemory(message, str(error))
        assert message is not None
        frames.append((message, payload))

    def _make_room(self, wanted: int) -> None:
        """Moves what is held to the front of a scratch buffer of at least `wanted` bytes."""
        held = self._scratch[self._start : self._end]
        if wanted > len(self._scratch):
            self._scratch = bytearray(wanted)
        self._scratch[: len(held)] = held
        self._start, self._end = 0, len(held)
