"""Large payloads between processes of one host: through memory that both map, instead of through their socket.

The sender copies the bytes into a segment and sends only where they are. The receiver opens it through /proc/PID/fd,
which the kernel grants to processes of the same user, maps it and reads in place. Whether the other side can open our
segments (it may be in another container) is found out by an offer, which it accepts or not; until then, and whenever
memory is short, payloads go through the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import weakref
from collections.abc import Callable, Iterable

import numpy as np

from shardserve.wire import relays
from shardserve.wire.process import spare_descriptors
from shardserve.wire.relays import Lent, Mapped
from shardserve.wire.segments import (
    PAGE,
    SEALS,
    TOKEN,
    WORDS,
    Bytes,
    Parcel,
    Segment,
    Words,
    map_memory,
    pool,
    words_of,
)

# Below, a socket is as fast: copying to the kernel and back costs less than what a segment needs around it.
SMALLEST = 256 << 10

OFFER, ACCEPT, FORGET = 1, 2, 3
# kind, pid, descriptor, token: that of the pool, or of the segment to forget
CONTROL = struct.Struct(f"<BII{TOKEN}s")
# pid, descriptor, token, receiver's word, segment's capacity, number of the use, bytes used
PLACE = struct.Struct(f"<II{TOKEN}sIQQQ")


class SharedError(Exception):
    """What the other side said of shared memory can't be; its connection is of no more use."""


class SharedPath:
    """Shared memory on one connection to a process of the same user: what we send, and what we are sent.

    send_control: writes a control record to the other side; any thread may call it. relay: what is sent here as it came
    on another such connection isn't copied.
    """

    def __init__(self, send_control: Callable[[bytes], object], relay: bool = False) -> None:
        self._send_control = send_control
        self._relay = relay
        self._lent: list[Lent] = []
        self.offered = False
        self.accepted = False
        self.closed = False
        # By token.
        self._mapped: dict[bytes, Mapped] = {}

    # What we send.

    def ready(self) -> bool:
        """Whether the other side takes our segments; the first who asks makes it the offer."""
        if self.offered:
            return self.accepted
        self.offered = True
        # Without descriptors there is no offer.
        with contextlib.suppress(OSError):
            ours = pool()
            probe = ours.join(self)
            if probe is not None:
                self._send_control(CONTROL.pack(OFFER, os.getpid(), probe, ours.token))
        return False

    def place(self, parcel: Parcel, size: int, fill: Callable[[Bytes], None]) -> bytes | None:
        """Where the parcel's `size` bytes are, which `fill` writes; None if they have to go through the socket."""
        segment = parcel.segment(size, fill)
        word = pool().enter(segment, self) if segment is not None else None
        if segment is None or word is None:
            return None
        return PLACE.pack(os.getpid(), segment.fd, segment.token, word, segment.capacity, segment.use, size)

    def place_relayed(self, buffers: Iterable[relays.Buffer], size: int, alignment: int) -> bytes | None:
        """Where these buffers are already, if they are a payload that came in shared memory; None if they aren't."""
        received = relays.find(buffers, size, alignment) if self._relay else None
        if received is None or (fd := received.mapped.descriptor()) is None or (lent := received.lend()) is None:
            return None
        self._lent = [*(other for other in self._lent if not other.read), lent]
        mapped = received.mapped
        mapped.told.add(self)
        return PLACE.pack(os.getpid(), fd, mapped.token, lent.word, len(mapped.memory), received.use, size)

    def forget(self, segment: Segment) -> None:
        """Tells the other side that this segment isn't used again."""
        self.forget_relayed(segment.token)

    def forget_relayed(self, token: bytes) -> None:
        """As `forget`, of a segment of somebody else."""
        with contextlib.suppress(OSError):
            self._send_control(CONTROL.pack(FORGET, os.getpid(), 0, token))

    # What we are sent.

    def control(self, record: bytes) -> None:
        """SharedError if it is none."""
        if len(record) != CONTROL.size:
            raise SharedError(f"a control record of {len(record)} bytes")
        kind, pid, fd, token = CONTROL.unpack(record)
        if kind == OFFER:
            if _can_open(pid, fd, token):
                self._send_control(CONTROL.pack(ACCEPT, os.getpid(), 0, token))
        elif kind == ACCEPT:
            self.accepted = self.offered and token == pool().token
        elif kind == FORGET:
            if (mapped := self._mapped.pop(token, None)) is not None:
                mapped.forget()
        else:
            raise SharedError(f"a control record of kind {kind}")

    def payload(self, place: bytes, limit: int) -> Bytes:
        """The bytes that are there, read-only; the sender may use them again when no view of this array is left.

        SharedError if there are none, or more than `limit`; MemoryError if they can't be mapped: they count as read.
        """
        if len(place) != PLACE.size:
            raise SharedError(f"a place of {len(place)} bytes")
        pid, fd, token, word, capacity, use, size = PLACE.unpack(place)
        if size > limit:
            raise SharedError(f"a payload of {size} bytes is over the limit of this connection")
        if word >= WORDS or size > capacity:
            raise SharedError(f"a place of {size} bytes, word {word}, in a segment of {capacity}")
        mapped = self._mapped.get(token)
        if mapped is None:
            mapped = self._mapped[token] = _map(pid, fd, token, capacity, word, use)
        if size > len(mapped.memory):
            raise SharedError(f"a place of {size} bytes in a segment of {len(mapped.memory)}")
        # A new array for each use: its end is the end of this use.
        data: Bytes = np.frombuffer(mapped.memory.data, np.uint8, size)
        weakref.finalize(data, _say_read, mapped.words, word, use, os.getpid()).atexit = False
        if self._relay:
            relays.remember(data, mapped, use)
        return data

    def close(self) -> None:
        """The connection ended."""
        self.closed = True
        for mapped in self._mapped.values():
            mapped.forget()
        self._mapped.clear()
        for lent in self._lent:
            lent.give_up()
        self._lent.clear()
        if self.offered:
            pool().leave(self)


def _say_read(words: Words, word: int, use: int, pid: int) -> None:
    # A forked child has its parent's arrays, too, and they end before the parent's.
    if os.getpid() == pid:
        words[word] = use


def _can_open(pid: int, fd: int, token: bytes) -> bool:
    try:
        # In another container this path may be anything: don't block on it, and don't make it our terminal.
        with spare_descriptors():
            probe = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(probe).st_mode) and os.pread(probe, TOKEN, 0) == token
    except OSError:
        return False
    finally:
        os.close(probe)


def _map(pid: int, fd: int, token: bytes, capacity: int, word: int, use: int) -> Mapped:
    """A segment's words, to be written, and its bytes, to be read. Without memory for these it is said in the word that
    this use was read, and MemoryError is raised."""
    what, source = f"descriptor {fd} of process {pid}", f"/proc/{pid}/fd/{fd}"
    try:
        with spare_descriptors():
            opened = os.open(source, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SharedError(f"{what}: {error.strerror}") from error
    try:
        # Sealed: it can't shrink under us, which would end this process when it reads.
        if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(opened).st_size != PAGE + capacity:
            raise SharedError(f"{what} is no segment of {capacity} bytes")
        if os.pread(opened, TOKEN, PAGE - TOKEN) != token:
            raise SharedError(f"{what} is another segment than was said")
        try:
            words = words_of(map_memory(opened, PAGE, writable=True))
            memory = map_memory(opened, PAGE + capacity, writable=False)[PAGE:]
        except OSError as error:
            # Written to the file, not through a mapping: if the number of mappings is exhausted (vm.max_map_count), the
            # words have none.
            os.pwrite(opened, np.uint64(use).tobytes(), np.uint64().nbytes * word)
            raise MemoryError(f"no memory for {capacity} bytes, to read what process {pid} shares") from error
        return Mapped(source, token, words, memory)
    except OSError as error:
        raise SharedError(f"{what}: {error.strerror}") from error
    finally:
        os.close(opened)
