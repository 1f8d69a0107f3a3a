"""The tests of tests/unit/agent/test_cuda_graphs.py, with the capture itself, and what a GPU adds."""

import logging

import torch

from shardserve.agent import cuda_graphs
from shardserve.agent.cuda_graphs import CudaGraphs
from shardserve.export.verification.threads import ThreadGroup
from shardserve.shards.program import Program
from shardserve.shards.regions import find_regions
from tests.models.lookup import RANKS
from tests.unit.agent.test_cuda_graphs import shards  # noqa: F401

from .moving import Moving

DEVICE = torch.device("cuda", 0)


class Ranks:
    """One rank of the two: CUDA captures in one thread of a process at a time. The other, eager, on the CPU."""

    def __init__(self, files):
        self.eager = [Program.load(file, device=DEVICE if rank == 0 else "cpu") for rank, file in enumerate(files)]
        self.programs = [Program.load(file, device=DEVICE if rank == 0 else "cpu") for rank, file in enumerate(files)]
        self.graphs = CudaGraphs(self.programs[0])
        self.graphs.start()
        self.regions = len(find_regions(self.programs[0].graph, 1))

    def step(self, rows, seed, ids=None):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
        ids = (torch.arange(rows) + seed) % 10 if ids is None else ids
        for one, other in zip(run(self.programs, x, ids), run(self.eager, x, ids), strict=True):
            if isinstance(one, str):
                assert one == other
            else:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        return self

    def captured(self):
        return [len(combination.graphs) for combination in self.graphs._combinations.values()]


def run(programs, x, ids):
    """What rank 0 gives."""
    dims = {"rows": len(x)}

    def work(collective):
        program = programs[collective.rank]
        with torch.inference_mode():
            given = [x.to(program.device), ids.to(program.device)]
            try:
                results = program.run(dims, given, Moving(collective, "cpu"))
            except IndexError as error:
                return [str(error), *program.drain(dims, Moving(collective, "cpu"))]
            # Of this thread: what follows a capture must not run where it was captured.
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
            return [result.cpu() for result in results]

    return [each.cpu() if isinstance(each, torch.Tensor) else each for each in ThreadGroup(RANKS).run(work)[0]]


def test_mixed_sizes(shards):  # noqa: F811
    ranks = Ranks(shards)
    for seed, rows in enumerate([3, 5, 3, 64, 5, 64, 3, 64, 5, 1, 1, 3, 1]):
        ranks.step(rows, seed)
    assert ranks.captured() == [ranks.regions] * 4


def test_an_exception_between_two_graphs(shards):  # noqa: F811
    ranks = Ranks(shards)
    wrong = torch.tensor([1, 99, 2])
    for seed, ids in enumerate([wrong, wrong, None, wrong, None]):
        ranks.step(3, seed, ids)


def test_combinations_go_and_come_again(shards, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    ranks = Ranks(shards)
    for seed in range(6):
        for rows in (2, 3, 4):
            ranks.step(rows, seed).step(rows, seed + 10)
    assert len(ranks.captured()) == 2


def test_a_capture_that_fails_leaves_the_stream_and_the_allocator_as_they_were(shards, caplog):  # noqa: F811
    ranks = Ranks(shards)
    eager = ranks.graphs._eager[0]

    def waits(*tensors):
        # Not permitted while a stream is captured.
        torch.cuda.current_stream().synchronize()
        return eager(*tensors)

    ranks.graphs._eager[0] = waits
    for seed in range(5):
        ranks.step(3, seed)
    assert ranks.captured() == [ranks.regions - 1]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "region 0 of its graph stays eager" in warnings[0]


def test_memory_has_an_end(shards):  # noqa: F811
    ranks = Ranks(shards)

    def use():
        for rows in range(1, 41):
            ranks.step(rows, rows).step(rows, rows)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = use()
    for _ in range(2):
        assert use() <= first + (1 << 20)
