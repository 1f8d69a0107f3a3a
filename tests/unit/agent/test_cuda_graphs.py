"""What of CUDA graphs needs no GPU: with a stand-in for the capture, which runs the function again into the tensors
that it gave, as a graph does. tests/gpu has the capture itself."""

import logging

import pytest
import torch

from shardserve.agent import cuda_graphs
from shardserve.agent.cuda_graphs import CudaGraphs
from shardserve.export.verification.threads import ThreadGroup
from shardserve.shards.program import Program
from tests.models.lookup import RANKS, LookupLayers, export_lookup


class Block(LookupLayers):
    """A lookup that may raise, between two collectives, and a buffer that each step changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x, ids):
        hidden = self.layers(x)
        self.total.add_(hidden.sum(0))
        return (hidden + 1) * self.total, self.head(self.table(ids) + hidden.relu() * 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return export_lookup(Block, tmp_path_factory.mktemp("block"))


class StandIn:
    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, run):
        self.captures += 1
        outputs = list(run())

        def replay():
            self.replays += 1
            for output, result in zip(outputs, run(), strict=True):
                output.copy_(result)

        return replay, outputs


class Ranks:
    """The shards with graphs, and as they are."""

    def __init__(self, shards, capture=StandIn):
        self.eager = [Program.load(shard) for shard in shards]
        self.programs = [Program.load(shard) for shard in shards]
        self.captures = [capture() for _ in shards]
        self.graphs = [CudaGraphs(*each) for each in zip(self.programs, self.captures, strict=True)]
        for program, graphs in zip(self.programs, self.graphs, strict=True):
            program.compiled = graphs.choose

    def step(self, rows, seed, ids=None):
        """Both, compared."""
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
        ids = (torch.arange(rows) + seed) % 10 if ids is None else ids
        for mine, theirs in zip(run(self.programs, x, ids), run(self.eager, x, ids), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one == other if isinstance(one, str) else torch.equal(one, other)
        return self

    @property
    def regions(self):
        return [len(graphs._eager) for graphs in self.graphs]

    def counts(self):
        return [(capture.captures, capture.replays) for capture in self.captures]


def run(programs, x, ids):
    group = ThreadGroup(RANKS)
    dims = {"rows": len(x)}

    def work(collective):
        program = programs[collective.rank]
        with torch.inference_mode():
            try:
                results = program.run(dims, [x, ids], collective)
            except IndexError as error:
                return [str(error), *program.drain(dims, collective)]
            # The place of the next step's.
            return [result.clone() for result in results]

    return group.run(work)


def test_the_second_step_of_a_combination_is_captured_and_later_ones_replay(shards):
    ranks = Ranks(shards)
    # Before and after the lookup, and after the collectives.
    assert min(ranks.regions) >= 3
    ranks.step(3, 1)
    assert ranks.counts() == [(0, 0)] * RANKS
    ranks.step(3, 2)
    assert ranks.counts() == [(n, n) for n in ranks.regions]
    ranks.step(5, 3).step(3, 4)
    assert ranks.counts() == [(n, 2 * n) for n in ranks.regions]
    ranks.step(5, 5).step(3, 6).step(5, 7)
    assert ranks.counts() == [(2 * n, 5 * n) for n in ranks.regions]


def test_an_exception_between_two_graphs(shards):
    ranks = Ranks(shards)
    wrong = torch.tensor([1, 99, 2])
    # While it runs eager, is captured, and is replayed.
    for seed, ids in enumerate([wrong, wrong, None, wrong, None]):
        ranks.step(3, seed, ids)
    assert ranks.counts()[0][0] == ranks.regions[0]


def test_parameters_buffers_and_what_graphs_gave_are_not_copied(shards):
    ranks = Ranks(shards)
    ranks.step(3, 1).step(3, 2)
    [combination] = ranks.graphs[0]._combinations.values()
    program = ranks.programs[0]
    for graph in combination.graphs.values():
        for _, place in graph.places:
            assert not program.is_fixed(place)
            # What the step was given, or a collective or lookup made of it.
            assert place.shape[0] == 3


def test_the_combination_that_was_not_used_for_longest_goes(shards, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    ranks = Ranks(shards)
    for rows in (2, 3, 4):
        ranks.step(rows, rows).step(rows, rows + 10)
    assert [list(graphs._combinations) for graphs in ranks.graphs] == [[(3,), (4,)]] * RANKS
    ranks.step(3, 20)
    # Once is not enough for one that has gone.
    ranks.step(2, 21)
    assert [list(graphs._combinations) for graphs in ranks.graphs] == [[(4,), (3,)]] * RANKS
    ranks.step(2, 22)
    assert [list(graphs._combinations) for graphs in ranks.graphs] == [[(3,), (2,)]] * RANKS


def test_combinations_that_came_once_are_forgotten_some_time(shards, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "REMEMBERED", 2)
    graphs = CudaGraphs(Program.load(shards[0]), StandIn())
    assert [graphs.choose((rows,)) for rows in (1, 2, 3, 1, 0, 0)] == [None] * 6
    assert graphs.choose((1,)) is not None


class Refusing(StandIn):
    def __call__(self, run):
        self.captures += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_region_that_can_not_be_captured_stays_eager_with_one_warning(shards, caplog):
    ranks = Ranks(shards, Refusing)
    for seed, rows in enumerate([3, 3, 3, 5, 5, 5]):
        ranks.step(rows, seed)
    assert ranks.counts() == [(n, 0) for n in ranks.regions]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == sum(ranks.regions)
    assert "rank 0: region 0 of its graph stays eager: operation not permitted when stream is capturing" in warnings


def test_on_a_cpu_steps_stay_eager_with_a_warning(shards, caplog):
    program = Program.load(shards[0])
    CudaGraphs(program).start()
    assert program.compiled is None
    assert "steps stay eager: compile=cuda_graphs is for CUDA, this rank is on cpu" in caplog.text
