"""Collectives of ranks on one host, through memory that they share.

Memory of a group of n ranks: n control lines of 64 bytes, then n x 2 slots. A control line holds three words of 32
bits: the rank's turn (the futex word: how many pieces it has published in this generation), whether its generation has
ended, and on whose turn it sleeps. To publish, a rank writes its slot, then its turn, and wakes whoever sleeps on it;
to read, it waits for the other's turn.
Each word has one writer, so no update is lost however a rank dies; only `abort` writes another's turn, to wake its
readers, who then see that the generation has ended.

Two slots a rank are enough: a rank that publishes turn t has seen all others at t-1, so they have read everything up to
t-2. Each element is reduced in rank order, by all ranks or, of large pieces, by one for all: all get the same bits.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from struct import Struct

import torch
from torch import Tensor

from shardserve.agent.collectives import futex
from shardserve.agent.collectives.errors import CollectiveBroken, check_splits, rows_of_a_part
from shardserve.agent.collectives.group import GroupCollective
from shardserve.agent.collectives.memory import LINE, memory_size
from shardserve.agent.lifetime import GenerationEnded, Lifetime

# A control word is a turn in the low bits; whatever is above them was added by aborts, to change the word.
TURNS = 1 << 24
# Words of a control line; a line has 16.
ABORTED = 1
SLEEPS_ON = 2  # 0: on nobody, else 1 + the rank
WORDS = LINE // 4
# Seconds that a rank looks again and again, giving the core away each time, before it sleeps. Only in groups that have
# a core for each rank; in others it looks twice. 16 KB on 2 busy cores, each pair interleaved in one run: on 2 ranks a
# p50 of 29 us, 35 without patience, and 46 instead of 54 where ranks compute for unequal times in between; on 8 ranks
# the same p50 (400 us), but twice the CPU time and the mean (760 us, else 380): each look costs the core's next turn.
PATIENCE = 50e-6
# On other machines a load may overtake the store before it, so who sleeps isn't known for sure: all are woken.
SEES_SLEEPERS = platform.machine() == "x86_64"
# Bytes of a piece above which more than two ranks share its reduction out among them, at the price of one more turn:
# p50 on 8 ranks 18 ms instead of 40 for 4 MB, 1.6 ms instead of 1.9 for 256 KB, but 0.84 ms instead of 0.62 for 64 KB;
# on 4 ranks 8.7 ms instead of 13.5, 0.65 instead of 0.60, 0.26 instead of 0.17.
SHARED_OUT = 1 << 17
# Shapes whose views of the slots are remembered; then all are forgotten.
REMEMBERED = 64

KINDS = (
    "all_reduce",
    "parts of all_reduce",
    "all_gather",
    "reduce_scatter",
    "the splits of all_to_all",
    "all_to_all",
    "broadcast",
)
ALL_REDUCE, PARTS, ALL_GATHER, REDUCE_SCATTER, SPLITS, ALL_TO_ALL, BROADCAST = range(len(KINDS))

# In front of each slot, so that a reader can tell that it is at the same place: step, index, kind, size in bytes.
_PLACE = Struct("=QIIQ")
PLACE_BYTES = _PLACE.size

Views = tuple[Tensor, ...]


class SharedMemoryCollective(GroupCollective):
    """One rank's part in its group, for one generation; every rank makes its own before any rank uses it."""

    def __init__(self, fd: int, rank: int, size: int, slot_bytes: int, lifetime: Lifetime, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._slot_bytes = slot_bytes
        self._timeout = timeout
        self._patience = PATIENCE if size <= len(os.sched_getaffinity(0)) else 0.0
        self._lifetime = lifetime
        self._memory = mmap.mmap(fd, memory_size(size, slot_bytes))
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._words = memoryview(self._memory)[: size * LINE].cast("I")
        self._address = self._bytes.data_ptr()
        self._own = rank * WORDS
        # Nearest first: ranks that began together are there in about this order.
        self._others = tuple((rank + ahead) % size for ahead in range(1, size))
        pitch = LINE + slot_bytes
        self._starts = [[size * LINE + (r * 2 + slot) * pitch for r in range(size)] for slot in (0, 1)]
        self._views: dict[tuple[torch.Size, torch.dtype], tuple[Views, Views]] = {}
        self._turn = 0
        self._step = 0
        self._index = 0
        # Acquired and released between data and turn: a fence on machines that reorder stores. And between the turn
        # and who sleeps: on x86_64 a full one.
        self._fence = threading.Lock()
        self._words[self._own + ABORTED] = 0
        self._words[self._own + SLEEPS_ON] = 0
        self._words[self._own] = 0
        lifetime.on_end(self._abort)

    def begin(self, step: int) -> None:
        """What follows is of this step: a rank that is at another, or has missed a collective, is found out."""
        self._step, self._index = step, 0

    def _abort(self) -> None:
        """Ends this rank's own wait, whichever word it sleeps on."""
        self._words[self._own + ABORTED] = 1
        for other in self._others:
            # Added, not set: two aborts at once must not give a word back the value that a wait expects.
            self._words[other * WORDS] = (self._words[other * WORDS] + TURNS) % (1 << 32)
            futex.wake(self._address + other * LINE)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if x.nbytes <= min(SHARED_OUT, self._slot_bytes):
            return _reduced(self._exchange(ALL_REDUCE, x), op)
        out = torch.empty_like(x)
        flat_in, flat_out = x.reshape(-1), out.reshape(-1)
        for start, stop in self._pieces(flat_in, self.size):
            pieces, whole = self._exchange(ALL_REDUCE, flat_in[start:stop]), flat_out[start:stop]
            each, rest = divmod(stop - start, self.size)
            if rest or self.size < 3 or whole.nbytes <= SHARED_OUT:
                _reduced(pieces, op, whole)
            else:
                low = self.rank * each
                part = _reduced(tuple(piece[low : low + each] for piece in pieces), op)
                torch.cat(self._exchange(PARTS, part), out=whole)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        if x.nbytes <= self._slot_bytes:
            return torch.cat(self._exchange(ALL_GATHER, x))
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        flat, rows = x.reshape(-1), out.reshape(self.size, -1)
        for start, stop in self._pieces(flat):
            for row, piece in zip(rows, self._exchange(ALL_GATHER, flat[start:stop]), strict=True):
                row[start:stop] = piece
        return out

    def reduce_scatter(self, x: Tensor, op: str) -> Tensor:
        out = x.new_empty((rows_of_a_part(x, self.size), *x.shape[1:]))
        flat_in, flat_out = x.reshape(-1), out.reshape(-1)
        first, last = self.rank * out.numel(), (self.rank + 1) * out.numel()
        for start, stop in self._pieces(flat_in):
            pieces = self._exchange(REDUCE_SCATTER, flat_in[start:stop])
            low, high = max(start, first), min(stop, last)
            if low < high:
                wanted = tuple(piece[low - start : high - start] for piece in pieces)
                _reduced(wanted, op, flat_out[low - first : high - first])
        return out

    def all_to_all(self, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]) -> Tensor:
        # Everybody shows everything: simple, and no rank needs to know what others send to each other but this.
        check_splits(x, input_splits, self.size)
        layouts = torch.stack(self._exchange(SPLITS, torch.tensor(list(input_splits), dtype=torch.int64)))
        counts = layouts[:, self.rank].tolist()
        if counts != list(output_splits):
            raise CollectiveBroken(f"rank {self.rank} expects {list(output_splits)} rows, is sent {counts}")
        most, width = int(layouts.sum(1).max()), math.prod(x.shape[1:])
        out = x.new_empty((sum(counts), *x.shape[1:]))
        if most * width == 0:
            return out
        shown = x
        if most > x.shape[0]:
            shown = x.new_zeros((most, *x.shape[1:]))
            shown[: x.shape[0]] = x
        flat_in, flat_out = shown.reshape(-1), out.reshape(-1)
        firsts = (layouts.cumsum(1) - layouts)[:, self.rank].tolist()
        for start, stop in self._pieces(flat_in):
            at = 0
            for piece, first, count in zip(
                self._exchange(ALL_TO_ALL, flat_in[start:stop]), firsts, counts, strict=True
            ):
                low, high = max(start, first * width), min(stop, (first + count) * width)
                if low < high:
                    to = at + low - first * width
                    flat_out[to : to + high - low] = piece[low - start : high - start]
                at += count * width
        return out

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        if x.nbytes <= self._slot_bytes:
            return self._exchange(BROADCAST, x)[src].clone()
        out = torch.empty_like(x)
        flat_in, flat_out = x.reshape(-1), out.reshape(-1)
        for start, stop in self._pieces(flat_in):
            flat_out[start:stop] = self._exchange(BROADCAST, flat_in[start:stop])[src]
        return out

    def _pieces(self, flat: Tensor, multiple: int = 1) -> list[tuple[int, int]]:
        """Ranges of elements that fit a slot, all but the last a multiple of `multiple`; an empty tensor is one empty
        piece, so that ranks stay in step.
        """
        count = flat.numel()
        step = max(self._slot_bytes // flat.element_size() // multiple, 1) * multiple
        return [(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def _views_of(self, shape: torch.Size, dtype: torch.dtype, size: int) -> tuple[Views, Views]:
        """For both slots, all ranks' tensors of this shape."""
        if len(self._views) == REMEMBERED:
            self._views.clear()
        first, second = (
            tuple(self._bytes[at + LINE : at + LINE + size].view(dtype).view(shape) for at in starts)
            for starts in self._starts
        )
        self._views[shape, dtype] = first, second
        return first, second

    def _exchange(self, kind: int, piece: Tensor) -> Views:
        """Publishes a piece and gives all ranks' pieces, in rank order: views, valid until the next exchange."""
        if self._lifetime.ended:
            raise GenerationEnded
        self._turn = turn = (self._turn + 1) % TURNS
        self._index += 1
        slot, size = turn % 2, piece.nbytes
        known = self._views.get((piece.shape, piece.dtype))
        views = (known or self._views_of(piece.shape, piece.dtype, size))[slot]
        place = _PLACE.pack(self._step, self._index, kind, size)
        starts = self._starts[slot]
        at = starts[self.rank]
        self._memory[at : at + PLACE_BYTES] = place
        views[self.rank].copy_(piece)
        self._publish(turn)
        for other in self._others:
            self._wait(other, turn)
            at = starts[other]
            theirs = self._memory[at : at + PLACE_BYTES]
            if theirs != place:
                raise CollectiveBroken(f"rank {self.rank} is at {_text(place)}, rank {other} at {_text(theirs)}")
        return views

    def _publish(self, turn: int) -> None:
        words, me = self._words, self.rank + 1
        with self._fence:
            pass
        words[self._own] = turn
        with self._fence:
            pass
        for other in self._others:
            if words[other * WORDS + SLEEPS_ON] == me or not SEES_SLEEPERS:
                futex.wake(self._address + self.rank * LINE)
                return

    def _wait(self, other: int, turn: int) -> None:
        words, aborted, theirs = self._words, self._own + ABORTED, other * WORDS
        # The other may be one turn ahead: it has read ours and published the next piece in the other slot.
        there = turn, (turn + 1) % TURNS
        began = 0.0
        while words[theirs] % TURNS not in there:
            if words[aborted]:
                raise GenerationEnded
            now = time.monotonic()
            began = began or now
            if now - began > self._patience:
                self._sleep(other, there, began + self._timeout)
                break
            os.sched_yield()
        if words[aborted]:
            raise GenerationEnded

    def _sleep(self, other: int, there: tuple[int, int], deadline: float) -> None:
        words, theirs, sleeps_on = self._words, other * WORDS, self._own + SLEEPS_ON
        words[sleeps_on] = other + 1
        try:
            # Said before the other's turn is read, as the other writes its turn before it reads who sleeps.
            with self._fence:
                pass
            while (word := words[theirs]) % TURNS not in there and not words[self._own + ABORTED]:
                left = deadline - time.monotonic()
                if left <= 0 or not futex.wait(self._address + other * LINE, word, left):
                    raise CollectiveBroken(
                        f"rank {self.rank} waited {self._timeout} s for rank {other} at turn {there[0]}, "
                        f"piece {self._index} of step {self._step}"
                    )
        finally:
            words[sleeps_on] = 0


def _text(place: bytes) -> str:
    step, index, kind, size = _PLACE.unpack(place)
    what = KINDS[kind] if kind < len(KINDS) else f"kind {kind}"
    return f"{what} of {size} bytes, piece {index} of step {step}"


_COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def _reduced(parts: Views, op: str, out: Tensor | None = None) -> Tensor:
    """Into `out` where one is given. The first two at once: no temporary, no copy."""
    combine = _COMBINE[op]
    if len(parts) == 1:
        out = parts[0].clone() if out is None else out.copy_(parts[0])
    else:
        out = combine(parts[0], parts[1]) if out is None else combine(parts[0], parts[1], out=out)
        for part in parts[2:]:
            combine(out, part, out=out)
    return out.div_(len(parts)) if op == "avg" else out
