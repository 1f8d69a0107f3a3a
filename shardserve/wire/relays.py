"""Relays: what came in shared memory goes on to others where it is, without a copy.

A Worker tells agents where Main has put a request's bytes, and Main where an agent has put a step's. Before its own
reading is over, it marks one of the segment's last words as lent for this use. The other side writes the use into that
word when it looks at the bytes no more, as every receiver does, and the owner looks for such marks. Only one process
relays what is in a segment, so nobody else takes the same word, and it does so in one thread.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shardserve.wire.segments import LENT, LOST, PAGE, RECEIVERS, RELAYS, TOKEN, Bytes, Words

Buffer = bytes | bytearray | memoryview


class RelayingPath(Protocol):
    """A connection on which something is relayed."""

    def forget_relayed(self, token: bytes) -> None: ...


@dataclass(eq=False)
class Mapped:
    """A segment of another process. source: its descriptor there, under /proc. told: to whom it was relayed."""

    source: str
    token: bytes
    words: Words
    memory: Bytes
    told: weakref.WeakSet[RelayingPath] = field(default_factory=weakref.WeakSet)
    _fd: int | None = None

    def descriptor(self) -> int | None:
        """One of this process, which it is relayed by: its owner may end before it is opened. None if it has ended."""
        if self._fd is None:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                fd = os.open(self.source, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
                stack.callback(os.close, fd)
                if os.pread(fd, TOKEN, PAGE - TOKEN) == self.token:
                    stack.pop_all()
                    self._fd = fd
                    weakref.finalize(self, os.close, fd).atexit = False
        return self._fd

    def forget(self) -> None:
        """Has those to whom it was relayed forget it."""
        for path in self.told:
            path.forget_relayed(self.token)
        self.told.clear()


@dataclass(eq=False)
class Lent:
    """A word that somebody else is to write, and with it the descriptor by which it is opened until then."""

    mapped: Mapped
    word: int
    use: int

    @property
    def read(self) -> bool:
        return bool(self.mapped.words[self.word] != (LENT | np.uint64(self.use)))

    def give_up(self) -> None:
        """Nobody will write it."""
        if not self.read:
            self.mapped.words[self.word] = LOST


@dataclass(eq=False)
class Received:
    """A payload that came in shared memory, as long as there is a view of it."""

    mapped: Mapped
    use: int
    size: int
    count: int = 0

    def lend(self) -> Lent | None:
        """A word for one more reader; None if there is none left."""
        if self.count == RELAYS:
            return None
        lent = Lent(self.mapped, RECEIVERS + self.count, self.use)
        self.count += 1
        self.mapped.words[lent.word] = LENT | np.uint64(self.use)
        return lent


_received: dict[int, Received] = {}
"""By the address of the first byte."""


def remember(data: Bytes, mapped: Mapped, use: int) -> None:
    """For a payload that may be relayed."""
    address = data.ctypes.data
    _received[address] = received = Received(mapped, use, len(data))
    weakref.finalize(data, _forget, address, received).atexit = False


def _forget(address: int, received: Received) -> None:
    if _received.get(address) is received:
        del _received[address]


def find(buffers: Iterable[Buffer], size: int, alignment: int) -> Received | None:
    """The payload that these buffers are, one after the other, each padded to the alignment; None if they are none."""
    received, at = None, 0
    for buffer in buffers:
        part = np.frombuffer(buffer, np.uint8) if len(buffer) else None
        if part is None:
            continue
        address = part.ctypes.data
        if received is None:
            received, at = _received.get(address), address
        if received is None or received.size != size or address != at:
            return None
        at += -(-len(part) // alignment) * alignment
    return received
