"""Large payloads between processes of one host: through memory that both map, instead of through their socket.

The sender copies the bytes into a segment of its own (a sealed memfd: no name, no limit of /dev/shm, gone with the
last process that has it) and sends only where they are. The receiver opens the segment through /proc/PID/fd, which the
kernel grants to processes of the same user, maps it and reads in place. A segment's first page has a word for each
receiver of what is in it; the receiver writes the number of the use there when it looks at the bytes no more. Only when
all have, the sender uses the segment again; if a receiver's connection ended before, never.

Whether the other side can open our segments (it may be in another container) is found out by an offer, which it accepts
or not; until then, and whenever memory is short, payloads go through the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE = 4096
WORD = 8
RECEIVERS = PAGE // WORD
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
TOKEN = 16

# Below, a socket is as fast: copying to the kernel and back costs less than what a segment needs around it.
SMALLEST = 256 << 10
# What one process keeps in segments; over it, payloads go through the socket.
LARGEST_POOL = 4 << 30
# Seconds after which a segment of a size that isn't needed any more is given up, when another is asked for.
IDLE = 60.0

OFFER, ACCEPT, FORGET = 1, 2, 3
# kind, pid, descriptor, token or a segment's number in its first 8 bytes
CONTROL = struct.Struct(f"<BII{TOKEN}s")
# pid, descriptor, receiver's word, segment's number, segment's size, number of the use, bytes used
PLACE = struct.Struct("<IIIQQQQ")


class SharedError(Exception):
    """What the other side said of shared memory can't be; its connection is of no more use."""


class Segment:
    """Memory that this process shares: a page of words, then up to `capacity` bytes."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.capacity = capacity
        self.use = 0
        # The connections whose receivers may look at it, one a word; those that were ever told of it.
        self.readers: list[SharedPath] = []
        self.told: set[SharedPath] = set()
        self.used = 0.0
        self.held = False
        self.fd = os.memfd_create("shardserve-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, PAGE + capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            # Pages that can't be had are an error here, and a signal that ends the process when they are written.
            os.posix_fallocate(self.fd, 0, PAGE + capacity)
            self._memory = mmap.mmap(self.fd, PAGE + capacity)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = np.frombuffer(self._memory, np.uint64, RECEIVERS)
        self.data: Bytes = np.frombuffer(self._memory, np.uint8, capacity, PAGE)

    @property
    def free(self) -> bool:
        return not self.held and all(self._words[i] == self.use for i in range(len(self.readers)))

    def has_been_read_by(self, path: SharedPath) -> bool:
        return bool(self._words[self.readers.index(path)] == self.use)

    def close(self) -> None:
        """Has those that have mapped it forget it; it is gone when nobody looks at it any more."""
        for path in self.told:
            path.forget(self)
        os.close(self.fd)


class Pool:
    """The segments of this process. Any thread may use it."""

    def __init__(self, limit: int = LARGEST_POOL) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._numbers = 0
        self._paths: set[SharedPath] = set()
        self._probe = -1
        self.token = secrets.token_bytes(TOKEN)

    def join(self, path: SharedPath) -> int:
        """For a connection on which segments may be sent; the descriptor of what proves that they can be opened."""
        with self._lock:
            if not self._paths:
                self._probe = os.memfd_create("shardserve-probe", os.MFD_CLOEXEC)
                os.write(self._probe, self.token)
            self._paths.add(path)
            return self._probe

    def take(self, size: int) -> Segment | None:
        """A segment that nobody looks at, of at least `size` bytes, until `give_back`; None if memory is short."""
        dropped: list[Segment] = []
        with self._lock:
            free = [segment for segment in self._segments if segment.free]
            fitting = [segment for segment in free if size <= segment.capacity <= 4 * size]
            now = time.monotonic()
            dropped += [segment for segment in free if segment not in fitting and segment.used < now - IDLE]
            if fitting:
                segment: Segment | None = min(fitting, key=lambda segment: segment.capacity)
            else:
                segment = self._new(size, [segment for segment in free if segment not in dropped], dropped)
            if segment is not None:
                segment.use += 1
                segment.used = now
                segment.readers = []
                segment.held = True
            for old in dropped:
                self._segments.remove(old)
        for old in dropped:
            old.close()
        return segment

    def _new(self, size: int, free: list[Segment], dropped: list[Segment]) -> Segment | None:
        # In steps of an eighth, so that sizes that are nearly the same find each other's segments.
        step = max(PAGE, 1 << ((size - 1).bit_length() - 3))
        capacity = -(-size // step) * step
        room = self._limit - capacity - sum(segment.capacity for segment in self._segments if segment not in dropped)
        while room < 0 and free:
            dropped.append(free.pop())
            room += dropped[-1].capacity
        if room < 0:
            return None
        self._numbers += 1
        try:
            segment = Segment(self._numbers, capacity)
        except OSError:
            return None
        self._segments.append(segment)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Nothing more is sent of it: it is used again when all have read it."""
        with self._lock:
            segment.held = False

    def enter(self, segment: Segment, path: SharedPath) -> int | None:
        """The word of one more receiver; None if there is none left, or its connection has ended."""
        with self._lock:
            if path.closed or len(segment.readers) == RECEIVERS:
                return None
            segment.readers.append(path)
            segment.told.add(path)
            return len(segment.readers) - 1

    def leave(self, path: SharedPath) -> None:
        """The connection ended: what its receiver may still look at is not used again. With the last one all ends."""
        with self._lock:
            path.closed = True
            self._paths.discard(path)
            dropped = []
            for segment in list(self._segments):
                segment.told.discard(path)
                lost = path in segment.readers and not segment.has_been_read_by(path)
                if lost or not self._paths:
                    self._segments.remove(segment)
                    dropped.append(segment)
            if not self._paths and self._probe >= 0:
                os.close(self._probe)
                self._probe = -1
        for segment in dropped:
            segment.close()

    def abandon(self) -> None:
        """In a forked child: the segments are the parent's."""
        for segment in self._segments:
            os.close(segment.fd)
        if self._probe >= 0:
            os.close(self._probe)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """That of this process, made when it is first needed."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = Pool()
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock
    _pool_lock = threading.Lock()
    if _pool is not None:
        _pool.abandon()
        _pool = None


os.register_at_fork(after_in_child=_after_fork)


class Parcel:
    """Buffers that are sent on several connections: they are copied into shared memory once. To be used in a `with`,
    within which they are sent."""

    def __init__(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self._buffers = buffers
        self._segment: Segment | None = None
        self._tried = False

    def __iter__(self) -> Iterator[bytes | bytearray | memoryview]:
        return iter(self._buffers)

    def segment(self, size: int, fill: Callable[[Bytes], None]) -> Segment | None:
        """That of the parcel, into which `fill` has written `size` bytes; None if memory is short."""
        if not self._tried:
            self._tried = True
            self._segment = pool().take(size)
            if self._segment is not None:
                fill(self._segment.data)
        return self._segment

    def __enter__(self) -> Parcel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._segment is not None:
            pool().give_back(self._segment)


class SharedPath:
    """Shared memory on one connection to a process of the same user: what we send, and what we are sent.

    send_control: writes a control record to the other side; any thread may call it.
    """

    def __init__(self, send_control: Callable[[bytes], object]) -> None:
        self._send_control = send_control
        self.offered = False
        self.accepted = False
        self._mapped: dict[tuple[int, int, int], tuple[npt.NDArray[np.uint64], mmap.mmap]] = {}
        self.closed = False

    # What we send.

    def ready(self) -> bool:
        """Whether the other side takes our segments; the first who asks makes it the offer."""
        if not self.offered:
            self.offered = True
            ours = pool()
            self._send_control(CONTROL.pack(OFFER, os.getpid(), ours.join(self), ours.token))
        return self.accepted

    def place(self, parcel: Parcel, size: int, fill: Callable[[Bytes], None]) -> bytes | None:
        """Where the parcel's `size` bytes are, which `fill` writes; None if they have to go through the socket."""
        segment = parcel.segment(size, fill)
        word = pool().enter(segment, self) if segment is not None else None
        if segment is None or word is None:
            return None
        return PLACE.pack(os.getpid(), segment.fd, word, segment.number, segment.capacity, segment.use, size)

    def forget(self, segment: Segment) -> None:
        """Tells the other side that this segment isn't used again."""
        number = segment.number.to_bytes(TOKEN, "little")
        with contextlib.suppress(OSError):
            self._send_control(CONTROL.pack(FORGET, os.getpid(), segment.fd, number))

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
            self._mapped.pop((pid, fd, int.from_bytes(token, "little")), None)
        else:
            raise SharedError(f"a control record of kind {kind}")

    def payload(self, place: bytes) -> Bytes:
        """The bytes that are there, read-only; the sender may use them again when this array is gone."""
        if len(place) != PLACE.size:
            raise SharedError(f"a place of {len(place)} bytes")
        pid, fd, word, number, capacity, use, size = PLACE.unpack(place)
        if word >= RECEIVERS or size > capacity:
            raise SharedError(f"a place of {size} bytes, word {word}, in a segment of {capacity}")
        key = pid, fd, number
        if key not in self._mapped:
            self._mapped[key] = _map(pid, fd, capacity)
        words, memory = self._mapped[key]
        data: Bytes = np.frombuffer(memory, np.uint8, size, PAGE)
        weakref.finalize(data, partial(words.__setitem__, word, use)).atexit = False
        return data

    def close(self) -> None:
        """The connection ended."""
        self._mapped.clear()
        if self.offered:
            pool().leave(self)


def _can_open(pid: int, fd: int, token: bytes) -> bool:
    try:
        probe = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.pread(probe, TOKEN, 0) == token
    finally:
        os.close(probe)


def _map(pid: int, fd: int, capacity: int) -> tuple[npt.NDArray[np.uint64], mmap.mmap]:
    """A segment's words, to be written, and all of it, to be read."""
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SharedError(f"descriptor {fd} of process {pid}: {error.strerror}") from error
    try:
        # Sealed: it can't shrink under us, which would end this process when it reads.
        if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(opened).st_size != PAGE + capacity:
            raise SharedError(f"descriptor {fd} of process {pid} is no segment of {capacity} bytes")
        words = np.frombuffer(mmap.mmap(opened, PAGE), np.uint64)
        return words, mmap.mmap(opened, PAGE + capacity, prot=mmap.PROT_READ)
    except OSError as error:
        raise SharedError(f"descriptor {fd} of process {pid}: {error.strerror}") from error
    finally:
        os.close(opened)
