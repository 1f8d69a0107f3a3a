"""One model on tensor_parallel x pipeline_parallel ranks: placements, cuts, the ranks' graphs, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from shardserve.errors import ExportError
from shardserve.export import cost, planning
from shardserve.export.cost import RankCost, Sizes
from shardserve.export.layouts import balance
from shardserve.export.planning.plan import Plan
from shardserve.export.sharding import cut
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.sharding.propagate import Kept, LocalGraph, propagate
from shardserve.export.sharding.state import settle
from shardserve.export.tracing.trace import Trace
from shardserve.progress import Progress, quietly

Placements = Mapping[str, Replicate | Shard]


@dataclass(frozen=True)
class Planned:
    """The placement of every tensor, the plan that says so, and, of one that was found, what stays whole and why."""

    placements: Placements
    plan: Plan
    replicated: tuple[str, ...] | None

    @property
    def only_replicated(self) -> bool:
        return all(isinstance(placement, Replicate) for placement in self.placements.values())


@dataclass(frozen=True)
class Layout:
    """The graphs of the first tensor-parallel ranks, mostly of all, over all stages."""

    traced: Trace
    tensor_parallel: int
    pipeline_parallel: int
    planned: Planned
    cuts: tuple[str, ...]
    graphs: tuple[LocalGraph, ...]

    @cached_property
    def stages(self) -> list[list[cut.StageGraph]]:
        """Stage i of coordinate j."""
        by_coordinate = [cut.split(graph, self.pipeline_parallel) for graph in self.graphs]
        return [list(ranks) for ranks in zip(*by_coordinate, strict=True)]

    @cached_property
    def costs(self) -> list[list[RankCost]]:
        """Of stage i on coordinate j."""
        meanings = [graph.meanings() for graph in self.graphs]
        return [
            [cost.rank_cost(part, tensors, self.traced.tensors) for part, tensors in zip(ranks, meanings, strict=True)]
            for ranks in self.stages
        ]

    @cached_property
    def repeated(self) -> dict[str, int]:
        """The tensors that several pipeline stages have, tied ones once → their bytes in all but the first of these, of
        one rank a stage.
        """
        seen: set[tuple[object, ...]] = set()
        found: dict[str, int] = {}
        for ranks in self.stages:
            held = {cost.storage(self.traced.tensors[bound.tensor]): bound for bound in ranks[0].parameters}
            for key, bound in held.items():
                if key in seen:
                    nbytes = int(cost.nbytes(bound.shape, bound.dtype))
                    found[bound.tensor] = found.get(bound.tensor, 0) + nbytes
            seen |= held.keys()
        return found

    def activation_bytes(self, sizes: Sizes) -> list[list[int]]:
        """The most bytes that a step's tensors take at once, of stage i on coordinate j."""
        meanings = [graph.meanings() for graph in self.graphs]
        return [
            [cost.activation_bytes(part, tensors, sizes) for part, tensors in zip(ranks, meanings, strict=True)]
            for ranks in self.stages
        ]

    def latency(self, sizes: Sizes) -> float:
        """Seconds of a step by the cost model, alone in the pipeline."""
        return cost.latency(self.costs, self.tensor_parallel, sizes)

    def interval(self, sizes: Sizes) -> float:
        """Seconds between two steps of a full pipeline."""
        return cost.interval(self.costs, self.tensor_parallel, sizes)


class Planner:
    """Layouts of one model's traces, its subgraphs, by one plan; placements are found once for each number of
    tensor-parallel ranks.

    `cuts`, else the plan's, name the module that begins each later stage; without them, stages are balanced, for the
    first subgraph.
    """

    def __init__(
        self,
        model: nn.Module,
        traces: Mapping[str, Trace],
        plan: Plan,
        cuts: Sequence[str] = (),
        progress: Progress = quietly,
    ) -> None:
        self.traces, self.plan, self.cuts, self.progress = traces, plan, tuple(cuts), progress
        self._named = dict(model.named_parameters(remove_duplicate=False))
        self._planned: dict[int, dict[str, Planned]] = {}
        self._balanced: dict[int, tuple[str, ...]] = {}
        # A plan's are wrong for one stage as well, which doesn't use them.
        cut.check_names(list(traces.values()), () if self.cuts else plan.cuts)

    def planned(self, size: int) -> dict[str, Planned]:
        """For each subgraph the placements on `size` ranks. ExportError for a plan that doesn't fit the model or the
        ranks.
        """
        if size not in self._planned:
            placements: dict[str, Replicate | Shard] = {}
            found: dict[str, Planned] = {}
            for subgraph, traced in self.traces.items():
                found[subgraph] = self._plan(traced, size, placements)
                placements |= found[subgraph].placements
            self._planned[size] = {name: replace(planned, placements=placements) for name, planned in found.items()}
        return self._planned[size]

    def lay_out(
        self, tensor_parallel: int, pipeline_parallel: int, coordinates: int | None = None
    ) -> dict[str, Layout]:
        """The layout of each subgraph, with the graphs of the first `coordinates` ranks of each stage alone, if given.
        ExportError for what can't be cut so.
        """
        planned = self.planned(tensor_parallel)
        placements = next(iter(planned.values())).placements
        cuts = self._cuts(pipeline_parallel)
        stages = {name: cut.assign(traced, cuts) for name, traced in self.traces.items()}
        cut.check_filled(list(self.traces.values()), list(stages.values()), cuts)
        kept = settle(list(self.traces.values()), placements, list(stages.values()), tensor_parallel)
        planned = {name: _with_kept(found, self.traces[name], kept) for name, found in planned.items()}
        graphs: dict[str, list[LocalGraph]] = {name: [] for name in self.traces}
        count = tensor_parallel if coordinates is None else min(coordinates, tensor_parallel)
        for rank in range(count):
            self.progress("cutting the graph", rank, count)
            for name, traced in self.traces.items():
                graphs[name].append(propagate(traced, placements, stages[name], tensor_parallel, rank, kept))
        return {
            name: Layout(traced, tensor_parallel, pipeline_parallel, planned[name], cuts, tuple(graphs[name]))
            for name, traced in self.traces.items()
        }

    def _cuts(self, stages: int) -> tuple[str, ...]:
        cuts = self.cuts or (tuple(self.plan.cuts) if stages > 1 else ())
        if not cuts and stages > 1:
            if stages not in self._balanced:
                self._balanced[stages] = balance.balance(next(iter(self.traces.values())), stages)
            return self._balanced[stages]
        if len(cuts) != stages - 1:
            raise ExportError(f"{stages} pipeline stages need {stages - 1} cuts, got {len(cuts)}: {', '.join(cuts)}")
        return cuts

    def _plan(self, traced: Trace, size: int, decided: Placements) -> Planned:
        """`decided`: placements of tensors that another subgraph has, too."""
        shapes = {tensor: tuple(value.shape) for tensor, value in traced.tensors.items()}
        given = {name: placement for name, placement in decided.items() if name in shapes}
        given |= self._given(shapes, size)
        placements: dict[str, Replicate | Shard] = dict.fromkeys(shapes, Replicate())
        if size == 1 or not self.plan.auto:
            return Planned(placements | given, self.plan, None)
        self.progress("finding a plan", 0, 1)
        kept = {name for other in self.traces.values() for name in other.updates}
        found = planning.find(traced, size, given, kept)
        placements = {**placements, **found.placements, **given}
        first = {id(value): name for name, value in self._named.items() if name in shapes}
        names = {name: first[id(value)] for name, value in self._named.items() if id(value) in first}
        names |= {name: name for name in shapes}
        complete = Plan(planning.patterns(traced, placements, names), self.plan.cuts)
        return Planned(placements, complete, found.replicated)

    def _given(self, traced: Mapping[str, tuple[int, ...]], size: int) -> dict[str, Replicate | Shard]:
        """The given placements. Tied weights have several names and one placement, given by any of them."""
        named = self._named
        given = self.plan.placements({**{name: tuple(value.shape) for name, value in named.items()}, **traced}, size)
        by_tensor: dict[int, tuple[str, Replicate | Shard]] = {}
        for name, placement in given.items():
            if name in named:
                first, decided = by_tensor.setdefault(id(named[name]), (name, placement))
                if decided != placement:
                    raise ExportError(
                        f"plan: '{first}' and '{name}' are one tied weight, given {decided} and {placement}"
                    )
        placements = {name: placement for name, placement in given.items() if name in traced}
        for name, value in named.items():
            if name in traced and id(value) in by_tensor:
                placements[name] = by_tensor[id(value)][1]
        return placements


def _with_kept(planned: Planned, traced: Trace, kept: Mapping[str, Kept]) -> Planned:
    """With the changed buffers that every rank has whole among what a found plan leaves so."""
    if planned.replicated is None:
        return planned
    total = sum(tensor.nbytes for tensor in traced.tensors.values())
    whole = [name for name, buffer in kept.items() if isinstance(buffer.placement, Replicate)]
    parts = {name: traced.tensors[name].nbytes / total for name in whole if name in traced.tensors}
    lines = [
        f"{name} ({part:.1%}): what is written into it is whole"
        for name, part in parts.items()
        if part >= planning.NOTABLE
    ]
    return replace(planned, replicated=(*lines, *planned.replicated))
