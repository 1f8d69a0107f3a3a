"""How a tensor lies on the ranks of a tensor-parallel group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from shardserve.errors import ExportError
from shardserve.export.symbols import Dim, divide

Blocks: TypeAlias = Dim | tuple[int, ...]
"""Blocks one after another in a dim: how many equal ones, or the size of each."""


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole tensor."""

    def __str__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Shard:
    """Every rank has an equal part of dim `dim`.

    With `blocks` other than 1 the dim is that many blocks one after another (a fused query-key-value projection has 3;
    a batch and its heads in one dim, as many as the batch is large), or blocks of these sizes (of queries of more heads
    than keys), and a rank has its part of each of them.
    """

    dim: int
    blocks: Blocks = 1

    def __post_init__(self) -> None:
        if isinstance(self.blocks, tuple) and len(set(self.blocks)) == 1:  # the same placement compares equal
            object.__setattr__(self, "blocks", len(self.blocks))

    def divides(self, size: Dim, ranks: int) -> bool:
        """Whether a dim of this size is such blocks, each of which divides into so many ranks."""
        if isinstance(self.blocks, tuple):
            return size == sum(self.blocks) and all(block % ranks == 0 for block in self.blocks)
        return divide(size, ranks * self.blocks) is not None

    def within(self, size: int, start: int, stop: int) -> Shard | None:
        """How the positions from start to stop of a dim of this size lie; None where they aren't whole blocks."""
        if start >= stop or not isinstance(self.blocks, (int, tuple)):
            return None
        if isinstance(self.blocks, tuple):
            ends = [0, *accumulate(self.blocks)]
            if start not in ends or stop not in ends:
                return None
            return Shard(self.dim, self.blocks[ends.index(start) : ends.index(stop)])
        block = size // self.blocks
        return None if start % block or stop % block else Shard(self.dim, (stop - start) // block)

    def __str__(self) -> str:
        return f"Shard({self.dim})" if self.blocks == 1 else f"Shard({self.dim}, blocks={self.blocks})"


@dataclass(frozen=True)
class Partial:
    """Every rank has a term; the reduction over the ranks is the tensor."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"Partial({self.op})"


Placement = Replicate | Shard | Partial

_BLOCKS = r"(\d+|\(\s*\d+(?:\s*,\s*\d+)+\s*\))"
_SHARD = re.compile(rf"Shard\(\s*(?:dim\s*=\s*)?(\d+)\s*(?:,\s*(?:blocks\s*=\s*)?{_BLOCKS}\s*)?\)\Z")


def parse_placement(text: str, where: str) -> Replicate | Shard:
    """The placement written as "Replicate()", "Shard(0)", "Shard(0, blocks=3)" or "Shard(0, blocks=(64, 16, 16))";
    ExportError begins with `where`.
    """
    if text.strip() == "Replicate()":
        return Replicate()
    match = _SHARD.match(text.strip())
    blocks = [int(block) for block in re.findall(r"\d+", match[2] or "1")] if match is not None else []
    if match is None or 0 in blocks:
        raise ExportError(
            f"{where}: '{text}' is not a placement: write Replicate(), Shard(0), Shard(0, blocks=3) or, for blocks of "
            "unequal sizes, Shard(0, blocks=(64, 16, 16))"
        )
    return Shard(int(match[1]), tuple(blocks) if len(blocks) > 1 else blocks[0])
