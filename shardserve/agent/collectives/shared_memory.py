"""Collectives of ranks on one host, through memory that they share.

Memory of a group of n ranks: n control lines of 64 bytes, then n x 2 slots. A control line holds the rank's turn (the
futex word: how many pieces it has published in this generation) and the word that ends the generation. To publish, a
rank writes its slot, then its turn, and wakes whoever sleeps on it; to read, it waits for the other's turn.
Each word has one writer, so no update is lost however a rank dies; only `abort` writes another's, to wake its readers,
who then see that the generation has ended.

Two slots a rank are enough: a rank that publishes turn t has seen all others at t-1, so they have read everything up to
t-2. Every rank adds in rank order, so all get the same bits.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardserve.agent.collectives import futex
from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.collectives.memory import LINE, memory_size
from shardserve.agent.lifetime import GenerationEnded, Lifetime

# A control word is a turn in the low bits; whatever is above them was added by aborts, to change the word.
TURNS = 1 << 24
# Turns that spin, giving the core away each time, before a waiting rank sleeps: about 20 us.
SPINS = 20


class _Line(ctypes.Structure):
    _fields_ = (("turn", ctypes.c_uint32), ("aborted", ctypes.c_uint32))


class _Header(ctypes.Structure):
    """In front of each slot: what was published, so that a reader can tell that it is at the same place."""

    _fields_ = (
        ("step", ctypes.c_uint64),
        ("index", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
    )

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.step, self.index, self.kind, self.size

    def __str__(self) -> str:
        return f"collective {self.kind} of {self.size} bytes, {self.index} of step {self.step}"


class SharedMemoryCollective:
    """One rank's part in its group, for one generation; every rank makes its own before any rank uses it."""

    def __init__(self, fd: int, rank: int, size: int, slot_bytes: int, lifetime: Lifetime, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._slot_bytes = slot_bytes
        self._timeout = timeout
        self._lifetime = lifetime
        self._memory = mmap.mmap(fd, memory_size(size, slot_bytes))
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._lines = [_Line.from_buffer(self._memory, LINE * r) for r in range(size)]
        self._words = [ctypes.addressof(line) for line in self._lines]
        self._turn = 0
        self._step = 0
        self._index = 0
        # Acquired and released between data and turn: a fence on machines that reorder stores.
        self._fence = threading.Lock()
        self._lines[rank].aborted = 0
        self._lines[rank].turn = 0
        lifetime.on_end(self._abort)

    def begin(self, step: int) -> None:
        """What follows is of this step: a rank that is at another, or has missed a collective, is found out."""
        self._step, self._index = step, 0

    def _abort(self) -> None:
        """Ends this rank's own wait, whichever word it sleeps on."""
        self._lines[self.rank].aborted = 1
        for other, line in enumerate(self._lines):
            if other != self.rank:
                # Added, not set: two aborts at once must not give a word back the value that a wait expects.
                line.turn = (line.turn + TURNS) % (1 << 32)
                futex.wake(self._words[other])

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        out = torch.empty_like(x)
        flat_in, flat_out = x.reshape(-1), out.reshape(-1)
        for start, stop in self._pieces(flat_in.numel(), x.element_size()):
            self._reduce(self._exchange(1, flat_in[start:stop]), op, flat_out[start:stop])
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size, *x.shape))
        self._gather(x.reshape(-1), out.reshape(self.size, -1), kind=2)
        return out.reshape(self.size * x.shape[0], *x.shape[1:])

    def _gather(self, flat: Tensor, rows: Tensor, kind: int) -> None:
        for start, stop in self._pieces(flat.numel(), flat.element_size()):
            for row, piece in zip(rows, self._exchange(kind, flat[start:stop]), strict=True):
                row[start:stop] = piece

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        whole = self.all_reduce(x, op)
        return whole.chunk(self.size)[self.rank].contiguous()

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        # Everybody shows everything: simple, and no rank needs to know what others send to each other but this.
        layout = torch.tensor(list(input_splits), dtype=torch.int64)
        layouts = torch.empty((self.size, self.size), dtype=torch.int64)
        self._gather(layout, layouts, kind=3)
        counts = layouts[:, self.rank].tolist()
        if counts != list(output_splits):
            raise CollectiveBroken(f"rank {self.rank} expects {list(output_splits)} rows, is sent {counts}")
        sizes = layouts.sum(1).tolist()
        if max(sizes) * math.prod(x.shape[1:]) == 0:
            return x.new_empty((sum(counts), *x.shape[1:]))
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        everything = self.all_gather(padded).reshape(self.size, *padded.shape)
        starts = (layouts.cumsum(1) - layouts)[:, self.rank].tolist()
        parts = [
            everything[r, start : start + count] for r, (start, count) in enumerate(zip(starts, counts, strict=True))
        ]
        return torch.cat(parts)

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        out = torch.empty_like(x)
        flat_in, flat_out = x.reshape(-1), out.reshape(-1)
        for start, stop in self._pieces(flat_in.numel(), x.element_size()):
            flat_out[start:stop] = self._exchange(4, flat_in[start:stop])[src]
        return out

    def _pieces(self, count: int, element_size: int) -> list[tuple[int, int]]:
        """Ranges of elements that fit a slot; an empty tensor is one empty piece, so that ranks stay in step."""
        step = self._slot_bytes // element_size
        return [(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    @staticmethod
    def _reduce(parts: list[Tensor], op: str, out: Tensor) -> None:
        combine = _COMBINE[op]
        if len(parts) == 1:
            out.copy_(parts[0])
        else:
            combine(parts[0], parts[1], out=out)
            for part in parts[2:]:
                combine(out, part, out=out)
        if op == "avg":
            out.div_(len(parts))

    def _exchange(self, kind: int, piece: Tensor) -> list[Tensor]:
        """Publishes a flat piece and gives all ranks' pieces, in rank order: views, valid until the next exchange."""
        if self._lifetime.ended:
            raise GenerationEnded
        self._turn = (self._turn + 1) % TURNS
        slot = self._turn % 2
        size = piece.numel() * piece.element_size()
        at = self._slot(self.rank, slot)
        header = _Header.from_buffer(self._memory, at)
        self._index += 1
        header.step, header.index, header.kind, header.size = self._step, self._index, kind, size
        if size:
            self._bytes[at + LINE : at + LINE + size] = piece.view(torch.uint8)
        with self._fence:
            pass
        self._lines[self.rank].turn = self._turn
        if self.size > 1:
            futex.wake(self._words[self.rank])
        parts = []
        for other in range(self.size):
            if other != self.rank:
                self._wait(other)
            at = self._slot(other, slot)
            theirs = _Header.from_buffer(self._memory, at)
            if theirs.place != header.place:
                raise CollectiveBroken(f"rank {self.rank} is at {header}, rank {other} at {theirs}")
            parts.append(self._bytes[at + LINE : at + LINE + size].view(piece.dtype))
        return parts

    def _slot(self, rank: int, slot: int) -> int:
        return self.size * LINE + (rank * 2 + slot) * (LINE + self._slot_bytes)

    def _wait(self, other: int) -> None:
        line, own = self._lines[other], self._lines[self.rank]
        deadline = 0.0
        spins = 0
        while True:
            word = line.turn
            if own.aborted:
                raise GenerationEnded
            # The other may be one turn ahead: it has read ours and published the next piece in the other slot.
            if word % TURNS in (self._turn, (self._turn + 1) % TURNS):
                return
            if spins < SPINS:
                spins += 1
                os.sched_yield()
                continue
            now = time.monotonic()
            deadline = deadline or now + self._timeout
            if now >= deadline or not futex.wait(self._words[other], word, deadline - now):
                raise CollectiveBroken(
                    f"rank {self.rank} waited {self._timeout} s for rank {other} at turn {self._turn}"
                )


_COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
