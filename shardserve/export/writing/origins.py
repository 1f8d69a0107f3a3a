"""What the tensors that cross a pipeline cut are in the whole model: written into the shards, and read by `verify`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from shardserve.errors import ExportError
from shardserve.export.sharding.cut import modules
from shardserve.export.sharding.placements import Placement, Shard, parse_placement
from shardserve.export.sharding.propagate import LocalGraph
from shardserve.export.symbols import Printer
from shardserve.export.writing.write import part
from shardserve.shards import expressions
from shardserve.shards.config import Origin

_SHARD = re.compile(r"Shard\((\d+)(?:, blocks=(.+))?\)\Z")
# Not the expressions that begin so: "(n + 2) // 2".
_SIZES = re.compile(r"\(\d+(, \d+)+\)")


def origin(name: str, graph: LocalGraph, printer: Printer) -> Origin:
    """That of a tensor in a rank's graph."""
    if name not in graph.origins:
        return Origin()
    node, placement = graph.origins[name]
    inside = modules(node)
    return Origin(node.name, inside[-1] if inside else "", _written(placement, printer))


def _written(placement: Placement, printer: Printer) -> str:
    if not isinstance(placement, Shard) or placement.blocks == 1 or isinstance(placement.blocks, tuple):
        return str(placement)
    try:
        return f"Shard({placement.dim}, blocks={printer.size(placement.blocks)})"
    except ExportError:
        return ""


def rank_part(whole: Tensor, ranks: int, coordinate: int, placement: str, dims: Mapping[str, int]) -> Tensor | None:
    """What a rank sends of a tensor of the whole model; None where the tensor isn't known from one rank alone."""
    if placement == "Replicate()":
        return whole
    match = _SHARD.match(placement)
    if match is None:
        return None
    if match[2] and _SIZES.fullmatch(match[2]):
        given = parse_placement(placement, "what crosses a cut")
        if not isinstance(given, Shard) or given.dim >= whole.ndim or not given.divides(whole.shape[given.dim], ranks):
            return None
        return part(whole, given, ranks, coordinate)
    blocks = expressions.evaluate(match[2] if match[2] and not match[2].isdecimal() else int(match[2] or 1), dims)
    return part(whole, Shard(int(match[1]), blocks), ranks, coordinate)


def sum_of_terms(parts: Sequence[Tensor], placement: str) -> Tensor | None:
    """The tensor of which every rank sends a term, by addition; None for another placement."""
    if placement != "Partial(sum)":
        return None
    total = parts[0]
    for term in parts[1:]:
        total = total + term
    return total
