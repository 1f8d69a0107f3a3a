"""From the coordinates' graphs to what is written of each rank: config, graph file and weights."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import Tensor

from shardserve.errors import ExportError
from shardserve.export import cost
from shardserve.export.sharding import cut
from shardserve.export.sharding.propagate import Bound, LocalGraph
from shardserve.export.sharding.state import fill_value
from shardserve.export.tracing.trace import Trace
from shardserve.export.weights_file import Layout
from shardserve.export.writing import write
from shardserve.export.writing.origins import origin
from shardserve.shards.config import ShardConfig, Signature
from shardserve.shards.expressions import ExpressionError, parse
from shardserve.shards.graph import GraphFile


@dataclass(frozen=True)
class RankShard:
    """One rank's files in the making; `weights`: name in the weights file → parameter."""

    config: ShardConfig
    graph: GraphFile
    weights: Mapping[str, Bound]

    @property
    def collectives(self) -> tuple[str, ...]:
        """The kinds of collectives of a step, in order."""
        return tuple(node.op.partition(".")[2] for node in self.graph.nodes if node.op.startswith("collective."))

    @property
    def layout(self) -> Layout:
        """What the weights file will hold."""
        return {
            stored: (bound.dtype, tuple(int(size) for size in bound.shape)) for stored, bound in self.weights.items()
        }

    def part(self, stored: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the weights file, cut from the model's; a view of it where that is possible."""
        bound = self.weights[stored]
        return write.part(
            tensors[bound.tensor], bound.placement, self.config.tensor_parallel_size, self.config.coordinate
        )


def assemble(
    name: str, traced: Trace, graphs: Sequence[LocalGraph], signature: Signature, stage_size: int, state_id: str
) -> list[list[RankShard]]:
    """The shards of each stage, by coordinate; state_id: what all subgraphs that share buffers have.

    ExportError where a tensor can't cross a cut.
    """
    export_id = uuid.uuid4().hex
    at = cost.Sizes.example(traced).values
    example = {name: at[symbol] for symbol, name in traced.printer.names.items() if symbol in at}
    shards: list[list[RankShard]] = [[] for _ in range(stage_size)]
    fills = {kept.bound.tensor: fill_value(traced.tensors[kept.bound.tensor]) for kept in graphs[0].state}
    for graph in graphs:
        meaning = graph.meanings()
        stored = _stored_names(graph, traced.tensors)
        for stage, part in enumerate(cut.split(graph, stage_size)):
            receives = write.crossing_specs(part.receives, meaning, traced.printer) if stage else signature.inputs
            last = stage == stage_size - 1
            sends = signature.outputs if last else write.crossing_specs(part.sends, meaning, traced.printer)
            rank, rank_size = stage * len(graphs) + graph.coordinate, stage_size * len(graphs)
            state = write.state_specs(part)
            config = msgspec.structs.replace(
                write.empty_config(
                    name, export_id, state_id, signature, rank, rank_size, stage_size, receives, sends, state
                ),
                origins=() if last else tuple(origin(name, graph, traced.printer) for name in part.sends),
                flops=_flops(part, graph, traced),
                example_dims=example,
            )
            file = write.graph_file(part, meaning, signature, traced.printer, export_id, stored, fills)
            weights = {stored[bound.tensor]: bound for bound in part.parameters}
            weights |= {kept.bound.tensor: kept.bound for kept in part.state if fills[kept.bound.tensor] is None}
            shards[stage].append(RankShard(config, file, weights))
    for ranks in shards:
        _check_alike(ranks)
    return shards


def _flops(stage: cut.StageGraph, graph: LocalGraph, traced: Trace) -> int | str | None:
    """A rank's FLOPs as its config has them; None where they can't be written."""
    try:
        flops = traced.printer.size(cost.rank_cost(stage, graph.meanings(), traced.tensors).flops)
        if isinstance(flops, str):
            parse(flops)
        return flops
    except (ExportError, ExpressionError):
        return None


def with_all_weights(shards: Mapping[str, list[list[RankShard]]]) -> dict[str, list[list[RankShard]]]:
    """Subgraphs of one model, each rank with the weights of all of them: they are one file."""
    union: dict[int, dict[str, Bound]] = {}
    for stages in shards.values():
        for shard in (shard for ranks in stages for shard in ranks):
            union.setdefault(shard.config.rank, {}).update(shard.weights)
    return {
        subgraph: [[replace(shard, weights=union[shard.config.rank]) for shard in ranks] for ranks in stages]
        for subgraph, stages in shards.items()
    }


def _check_alike(ranks: Sequence[RankShard]) -> None:
    """All ranks of a group issue the same collectives, in the same order, or the group hangs or mixes data up."""
    first = ranks[0]
    for other in ranks[1:]:
        if write.collectives(other.graph) != write.collectives(first.graph) or other.config.sends != first.config.sends:
            raise ExportError(
                f"ranks {first.config.rank} and {other.config.rank} would do different collectives or sends: "
                "a bug in the exporter, please report it"
            )


def _stored_names(graph: LocalGraph, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the model → name in the weights file: tied weights, cut alike, are stored once."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, str] = {}
    for bound in graph.parameters:
        tensor = tensors[bound.tensor]
        memory = (tensor.data_ptr(), tensor.stride()) if tensor.numel() else bound.tensor
        key = (memory, tuple(tensor.shape), tensor.dtype, bound.placement)
        stored[bound.tensor] = first.setdefault(key, bound.tensor)
    return stored
