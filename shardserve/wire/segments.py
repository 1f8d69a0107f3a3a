"""Segments: memory that this process shares with others for payloads, each used again and again.

A segment is a sealed memfd: no name, no limit of /dev/shm, gone with the last process that has it. Its first page has a
word for each receiver of what is in it, and at its end a token by which a receiver knows that it opened the right one.
A receiver writes the number of the use into its word when it looks at the bytes no more. Only when all have, the
segment is used again; one whose receiver went away before is never, and is given up when the others have read it.
The last words are for those to whom a receiver relays the bytes: see wire/relays.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardserve.settings import Settings

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

PAGE = 4096
TOKEN = 16
WORDS = (PAGE - TOKEN) // 8
RELAYS = 64
RECEIVERS = WORDS - RELAYS
# A relay's word. LENT, with the number of the use: somebody may be reading. LOST: nobody can tell any more whether.
LENT = np.uint64(1 << 63)
LOST = np.uint64((1 << 64) - 1)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Each is a descriptor of this process.
MOST_SEGMENTS = 64
TRIMMING = "shared-memory-trim"
"""The name of the thread that gives up what isn't needed, as long as this process has segments."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_memory(fd: int, size: int, writable: bool) -> Bytes:
    """The first `size` bytes of a descriptor, mapped until no view of them is left. OSError if that can't be done.

    Not by Python's mmap: until 3.13 it keeps a descriptor of its own for each.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    mapped: Bytes = np.frombuffer(memoryview(memory), np.uint8)
    mapped.flags.writeable = writable
    return mapped


def words_of(first_page: Bytes) -> Words:
    return first_page[: PAGE - TOKEN].view(np.uint64)


class SendingPath(Protocol):
    """A connection on which segments are sent."""

    closed: bool

    def forget(self, segment: Segment) -> None: ...


class Segment:
    """`data` is what receivers read."""

    def __init__(self, capacity: int) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self.capacity = capacity
        self.use = 0
        self.used = 0.0
        self.held = False
        self._lost = False
        # readers: who may look at it, by the word's index, None for those that are gone. told: who was ever sent its
        # place.
        self.readers: list[SendingPath | None] = []
        self.told: set[SendingPath] = set()
        self.fd = os.memfd_create("shardserve-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, PAGE + capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            # Pages that can't be had are an error here, and a signal that ends the process when they are written.
            os.posix_fallocate(self.fd, 0, PAGE + capacity)
            memory = map_memory(self.fd, PAGE + capacity, writable=True)
        except BaseException:
            os.close(self.fd)
            raise
        memory[PAGE - TOKEN : PAGE] = np.frombuffer(self.token, np.uint8)
        self._words = words_of(memory)
        self._relays = self._words[RECEIVERS:]
        self.data: Bytes = memory[PAGE:]

    @property
    def unread(self) -> bool:
        """Whether somebody may look at it still, as far as that can be told."""
        return (
            self.held
            or any(reader is not None and self._words[word] != self.use for word, reader in enumerate(self.readers))
            or (self._lent and not self.lost)
        )

    @property
    def lost(self) -> bool:
        """Whether it can't be told any more who looks at it."""
        return self._lost or bool((self._relays == LOST).any())

    @property
    def _lent(self) -> bool:
        return bool((self._relays == (LENT | np.uint64(self.use))).any())

    def leave(self, path: SendingPath) -> None:
        for word, reader in enumerate(self.readers):
            if reader is path:
                # What it had relayed to others it can't take back, so nobody can tell whether they still read.
                self._lost = self._lost or bool(self._words[word] != self.use) or self._lent
                self.readers[word] = None
        self.told.discard(path)

    def close(self) -> None:
        """Has those that have mapped it forget it; it is gone when nobody looks at it any more."""
        for path in self.told:
            path.forget(self)
        os.close(self.fd)


class Pool:
    """The segments of this process. Any thread may use it."""

    def __init__(self, limit: int, idle: float) -> None:
        self._limit = limit
        self._idle = idle
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._paths: set[SendingPath] = set()
        self._probe = -1
        self._trimming: threading.Timer | None = None
        self.token = secrets.token_bytes(TOKEN)

    def join(self, path: SendingPath) -> int | None:
        """For a connection on which segments may be sent: the descriptor of what proves that they can be opened. None
        if it has ended. OSError if there are no descriptors left."""
        with self._lock:
            if path.closed:
                return None
            if self._probe < 0:
                self._probe = os.memfd_create("shardserve-probe", os.MFD_CLOEXEC)
                os.write(self._probe, self.token)
            self._paths.add(path)
            return self._probe

    def take(self, size: int) -> Segment | None:
        """A segment that nobody looks at, of at least `size` bytes, until `give_back`; None if memory is short."""
        with self._lock:
            dropped = self._worn_out()
            free = [segment for segment in self._segments if not segment.unread and not segment.lost]
            fitting = [segment for segment in free if size <= segment.capacity <= 4 * size]
            # Of equal ones that which was used last, so that segments made for a burst fall idle and are trimmed.
            segment = min(fitting, key=lambda segment: (segment.capacity, -segment.used)) if fitting else None
            if segment is None:
                segment = self._new(size, free, dropped)
            if segment is not None:
                segment.use += 1
                segment.used = time.monotonic()
                segment.readers = []
                segment.held = True
        for old in dropped:
            old.close()
        return segment

    def _worn_out(self) -> list[Segment]:
        """Takes out what is lost or was not needed for long, and nobody looks at."""
        since = time.monotonic() - self._idle
        gone = [segment for segment in self._segments if (segment.lost or segment.used < since) and not segment.unread]
        self._segments = [segment for segment in self._segments if segment not in gone]
        return gone

    def _new(self, size: int, free: list[Segment], dropped: list[Segment]) -> Segment | None:
        # In steps of an eighth, so that sizes that are nearly the same find each other's segments.
        step = max(PAGE, 1 << ((size - 1).bit_length() - 3))
        capacity = -(-size // step) * step
        room = self._limit - capacity - sum(segment.capacity for segment in self._segments)
        while free and (room < 0 or len(self._segments) >= MOST_SEGMENTS):
            oldest = min(free, key=lambda segment: segment.used)
            free.remove(oldest)
            self._segments.remove(oldest)
            dropped.append(oldest)
            room += oldest.capacity
        if room < 0 or len(self._segments) >= MOST_SEGMENTS:
            return None
        try:
            segment = Segment(capacity)
        except OSError:
            return None
        self._segments.append(segment)
        if self._trimming is None:
            self._trim_later()
        return segment

    def _trim_later(self) -> None:
        timer = threading.Timer(self._idle, self._trim)
        timer.name = TRIMMING
        timer.daemon = True
        # Where no thread is to be had now, the next new segment tries again.
        with contextlib.suppress(RuntimeError):
            timer.start()
            self._trimming = timer

    def _trim(self) -> None:
        with self._lock:
            dropped = self._worn_out()
            self._trimming = None
            if self._segments:
                self._trim_later()
        for segment in dropped:
            segment.close()

    def give_back(self, segment: Segment) -> None:
        """Nothing more is sent of it: it is used again when all have read it."""
        with self._lock:
            segment.held = False

    def enter(self, segment: Segment, path: SendingPath) -> int | None:
        """The word of one more receiver; None if there is none left, or its connection has ended."""
        with self._lock:
            if path.closed or len(segment.readers) == RECEIVERS:
                return None
            segment.readers.append(path)
            segment.told.add(path)
            return len(segment.readers) - 1

    def leave(self, path: SendingPath) -> None:
        """The connection ended: what its receiver may still look at is not used again. With the last one all ends."""
        with self._lock:
            self._paths.discard(path)
            for segment in self._segments:
                segment.leave(path)
            dropped = self._worn_out() if self._paths else self._segments
            if not self._paths:
                self._segments = []
                if self._trimming is not None:
                    self._trimming.cancel()
                    self._trimming = None
                if self._probe >= 0:
                    os.close(self._probe)
                    self._probe = -1
        for segment in dropped:
            segment.close()

    def abandon(self) -> None:
        """In a forked child: the segments are the parent's."""
        for segment in self._segments:
            os.close(segment.fd)
        self._segments = []
        if self._probe >= 0:
            os.close(self._probe)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """That of this process, made when it is first needed."""
    global _pool
    with _pool_lock:
        if _pool is None:
            settings = Settings.from_environment()
            _pool = Pool(settings.shared_memory_bytes, settings.shared_memory_idle)
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
