"""How a tensor lies on the ranks of a tensor-parallel group."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardserve.errors import ExportError
from shardserve.export.symbols import Dim


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole tensor."""

    def __str__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Shard:
    """Every rank has an equal part of dim `dim`.

    With `blocks` > 1 the dim is that many blocks one after another (a fused query-key-value projection has 3; a batch
    and its heads in one dim, as many as the batch is large), and a rank has its part of each of them.
    """

    dim: int
    blocks: Dim = 1

    def __str__(self) -> str:
        return f"Shard({self.dim})" if self.blocks == 1 else f"Shard({self.dim}, blocks={self.blocks})"


@dataclass(frozen=True)
class Partial:
    """Every rank has a term; the reduction over the ranks is the tensor."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"Partial({self.op})"


Placement = Replicate | Shard | Partial

_SHARD = re.compile(r"Shard\(\s*(?:dim\s*=\s*)?(\d+)\s*(?:,\s*(?:blocks\s*=\s*)?(\d+)\s*)?\)\Z")


def parse_placement(text: str, where: str) -> Replicate | Shard:
    """The placement written as "Replicate()", "Shard(0)" or "Shard(0, blocks=3)"; ExportError begins with `where`."""
    if text.strip() == "Replicate()":
        return Replicate()
    match = _SHARD.match(text.strip())
    if match is None or match[2] == "0":
        raise ExportError(f"{where}: '{text}' is not a placement: write Replicate(), Shard(0) or Shard(0, blocks=3)")
    return Shard(int(match[1]), int(match[2] or 1))
