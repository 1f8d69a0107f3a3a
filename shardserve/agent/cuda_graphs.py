"""A shard's regions (shards.regions) as CUDA graphs: one launch for a region instead of one for each operator.

A graph does the same with the same memory each time, so there is one for each region and combination of the dims. The
first step of a combination runs eager, which is the warm-up that the device's libraries need; the second captures.
A region has no collectives and doesn't look at values, so no rank decides anything that another could decide otherwise.

Inputs are copied to the place that the graph reads them from; parameters, kept buffers (which are written between
regions, by their own operators) and what another graph of the same step gave are read where they are. What a graph
gives is overwritten when the same combination comes again: a step's outputs are on the host by then, and its buffers
have their new values.

Memory: the inputs and outputs of the regions of at most MOST combinations, and once, of the largest, what lies between.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardserve.shards.program import Forward, Program
from shardserve.shards.regions import Run, find_regions, region_graph, replace_regions

logger = logging.getLogger(__name__)

# Combinations of dims that have graphs; the one that wasn't used for longest goes.
MOST = 16
# Combinations that came once, and are remembered; then all are forgotten.
REMEMBERED = 1024

Capture = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]]
"""Gives what does again what the function does, and the tensors that it then has the results in."""


@dataclass
class _Graph:
    """places: of the inputs that are copied, the position and where to."""

    places: list[tuple[int, Tensor]]
    replay: Callable[[], None]
    outputs: Sequence[Tensor]

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        for index, place in self.places:
            place.copy_(tensors[index])
        self.replay()
        return self.outputs


@dataclass
class _Combination:
    """By region. outputs: the addresses of what its graphs give."""

    graphs: dict[int, _Graph] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)


class CudaGraphs:
    """Of one Program, whose `compiled` it becomes; in the thread that runs it."""

    def __init__(self, program: Program, capture: Capture | None = None) -> None:
        self._program = program
        self._capture = capture or _Capturing()
        self._dims = len(program.dims)
        regions = find_regions(program.graph, self._dims)
        self._eager: list[Forward] = [
            fx.GraphModule(torch.nn.Module(), region_graph(program.graph, self._dims, region)).forward
            for region in regions
        ]
        runs = [self._runner(index) for index in range(len(regions))]
        graph = replace_regions(program.graph, self._dims, regions, runs)
        self._forward: Forward = fx.GraphModule(torch.nn.Module(), graph).forward
        self._seen: set[tuple[int, ...]] = set()
        self._combinations: OrderedDict[tuple[int, ...], _Combination] = OrderedDict()
        self._current = _Combination()
        self._refused: set[int] = set()

    def start(self) -> None:
        """A warning says why not, if steps can't be captured."""
        if self._program.device.type != "cuda":
            logger.warning(
                "steps stay eager: compile=cuda_graphs is for CUDA, this rank is on %s", self._program.device
            )
        else:
            self._program.compiled = self.choose

    def choose(self, sizes: tuple[int, ...]) -> Forward | None:
        """The graph with captured regions, from the second step with these sizes of the dims on."""
        if 0 in sizes:
            return None
        combination = self._combinations.get(sizes)
        if combination is None:
            if sizes not in self._seen:
                if len(self._seen) >= REMEMBERED:
                    self._seen.clear()
                self._seen.add(sizes)
                return None
            self._seen.remove(sizes)
            if len(self._combinations) == MOST:
                self._combinations.popitem(last=False)
            combination = self._combinations[sizes] = _Combination()
        self._combinations.move_to_end(sizes)
        self._current = combination
        return self._forward

    def _runner(self, index: int) -> Run:
        def run(tensors: list[Tensor]) -> Sequence[Tensor]:
            graph = self._current.graphs.get(index)
            if graph is None:
                if index in self._refused:
                    return self._eager[index](*tensors)
                try:
                    graph = self._captured(index, tensors)
                except (RuntimeError, ValueError) as error:
                    self._refused.add(index)
                    rank = self._program.config.rank
                    logger.warning("rank %d: region %d of its graph stays eager: %s", rank, index, error)
                    return self._eager[index](*tensors)
            return graph.run(tensors)

        return run

    def _captured(self, index: int, tensors: Sequence[Tensor]) -> _Graph:
        """Nothing of it has run yet. ValueError, or what the device raises, if it can't be."""
        given = list(tensors)
        places = []
        # The first `dims` tensors only carry sizes, which the graph has captured.
        for position in range(self._dims, len(given)):
            tensor = given[position]
            if tensor.device != self._program.device:
                raise ValueError(f"it takes a tensor on {tensor.device}, whose values a graph would keep")
            address = tensor.untyped_storage().data_ptr()
            if address not in self._current.outputs and not self._program.is_fixed(tensor):
                given[position] = tensor.clone()
                places.append((position, given[position]))
        replay, outputs = self._capture(lambda: self._eager[index](*given))
        self._current.outputs |= {output.untyped_storage().data_ptr() for output in outputs}
        graph = self._current.graphs[index] = _Graph(places, replay, outputs)
        return graph


class _Capturing:
    """Captures into CUDA graphs that share memory, as they run in the order in which they were captured."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Of this thread alone: those that receive take pinned memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        except RuntimeError:
            # torch doesn't put the stream back when a capture fails.
            torch.cuda.set_stream(stream)
            raise
        return graph.replay, outputs
