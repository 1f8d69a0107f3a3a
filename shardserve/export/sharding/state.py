"""Buffers that a forward changes: how each lies on the ranks, and in which pipeline stage it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from shardserve.errors import ExportError
from shardserve.export.sharding.placements import Placement, Replicate, Shard
from shardserve.export.sharding.propagate import Kept, LocalGraph, propagate
from shardserve.export.tracing.trace import Trace

# Rounds beyond one a buffer in which placements may change. After them any placement is right: what is written is
# redistributed to it.
_ROUNDS = 3


def settle(
    traces: Sequence[Trace],
    placements: Mapping[str, Replicate | Shard],
    stages: Sequence[Mapping[fx.Node, int]],
    size: int,
) -> dict[str, Kept]:
    """How the buffers are kept that one of these subgraphs of a model changes; the others only read it then.

    A buffer lies as what is written into it, so that no step moves it, and is in the stage that writes it. Raises
    ExportError for one that two stages write.
    """
    kept = {name: Kept(placements[name], None) for traced in traces for name in traced.updates}
    # Without kept buffers there is nothing to settle.
    for count in range(len(kept) + _ROUNDS if kept else 0):
        pairs = list(zip(traces, stages, strict=True))
        graphs = [propagate(traced, placements, nodes, size, 0, kept) for traced, nodes in pairs]
        found = dict(kept)
        for name, old in kept.items():
            written = [graph.written[name].placement for graph in graphs if name in graph.written]
            if count < _ROUNDS:
                found[name] = replace(old, placement=_lies(written))
            for traced, graph, nodes in zip(traces, graphs, stages, strict=True):
                if name in traced.updates and (old.stage is not None or _from_data(graph, name)):
                    found[name] = replace(found[name], stage=_stage(name, nodes.get(traced.updates[name], 0), found))
        if found == kept:
            break
        kept = found
    return kept


def _lies(written: Sequence[Placement]) -> Replicate | Shard:
    for placement in written:
        if isinstance(placement, Shard) and isinstance(placement.blocks, int):  # verify has to guess them
            return placement
    return Replicate()


def _from_data(graph: LocalGraph, name: str) -> bool:
    return graph.from_data[graph.written[name].name]


def _stage(name: str, stage: int, found: Mapping[str, Kept]) -> int:
    earlier = found[name].stage
    if earlier is not None and earlier != stage:
        raise ExportError(f"the buffer '{name}' is changed in pipeline stages {earlier} and {stage}: move the cut")
    return stage


def changing(traced: Trace) -> dict[fx.Node, fx.Node]:
    """The buffers whose new value depends on the inputs' values: placeholder → that value."""
    placeholders = {name: node for node, name in traced.bound.items()}
    found: dict[fx.Node, fx.Node] = {}
    while True:
        reached = {*(node for _, node in traced.inputs), *found}
        for node in traced.graph.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        more = {placeholders[name]: node for name, node in traced.updates.items() if node in reached}
        if more.keys() == found.keys():
            return found
        found = more


def fill_value(tensor: Tensor) -> int | float | bool | None:
    """The value of all its elements; None if they differ, or are none that JSON has."""
    if not tensor.numel() or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    if not bool((tensor == first).all()) or (tensor.is_floating_point() and not bool(torch.isfinite(first))):
        return None
    value: int | float | bool = first.item()
    return value
