"""An exception inside a step: raised on every rank that meets it, and drained so that the group stays in step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardserve.export.verification.running import Shards
from shardserve.export.verification.threads import ThreadCollective, ThreadGroup
from shardserve.shards.program import Program

from .conftest import Exported

Layout = Callable[[int, int], Exported]


class Counted(ThreadCollective):
    """Counts the collectives and remembers the shapes of what it was given."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__(group, rank)
        self.seen: list[tuple[int, ...]] = []

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.seen.append(tuple(x.shape))
        return super()._exchange(x)


class Group(ThreadGroup):
    def rank(self, rank: int) -> Counted:
        return Counted(self, rank)


Outcome = tuple[BaseException | None, list[Tensor], list[tuple[int, ...]]]


def step(stage: list[Program], dims: dict[str, int], inputs: list[list[Tensor]]) -> list[Outcome]:
    """One step of one stage, each rank as an agent runs it."""

    def work(collective: ThreadCollective) -> Outcome:
        assert isinstance(collective, Counted)
        program = stage[collective.rank]
        try:
            return None, program.run(dims, inputs[collective.rank], collective), collective.seen
        except IndexError as error:
            return error, program.drain(dims, collective), collective.seen

    return Group(len(stage)).run(work)


def example(bad: int | None = None) -> list[Tensor]:
    ids = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))
    if bad is not None:
        ids[1, 3] = bad
    return [ids, torch.ones_like(ids)]


@pytest.mark.parametrize("bad", [-1, 256, 2**40])
def test_an_id_out_of_range_raises_on_every_rank(layout: Layout, bad: int) -> None:
    stage = Shards(layout(2, 2).out, "transformer").stages[0]
    outcomes = step(stage, {"batch": 2, "length": 5}, [example(bad)] * 2)
    for program, (error, sends, seen) in zip(stage, outcomes, strict=True):
        assert isinstance(error, IndexError)
        assert len(seen) == program.collective_count == 3
        assert [tuple(tensor.shape) for tensor in sends] == [(2, 1, 5, 5), (2, 5, 64)]
        assert not any(tensor.any() for tensor in sends)


def test_an_error_on_one_rank_leaves_the_group_in_step(layout: Layout) -> None:
    exported = layout(2, 1)
    (stage,) = Shards(exported.out, "transformer").stages
    dims = {"batch": 2, "length": 5}
    outcomes = step(stage, dims, [example(), example(256)])
    assert outcomes[0][0] is None
    assert isinstance(outcomes[1][0], IndexError)
    assert outcomes[0][2] == outcomes[1][2]
    assert len(outcomes[0][2]) == stage[0].collective_count
    after = step(stage, dims, [example(), example()])
    with torch.no_grad():
        expected = exported.model(*example())
    for error, sends, _ in after:
        assert error is None
        assert torch.allclose(sends[0], expected, atol=1e-5)


def test_an_aborted_collective_is_not_drained(layout: Layout) -> None:
    stage = Shards(layout(2, 1).out, "transformer").stages[0]

    class Aborted(Exception):
        pass

    class Broken(ThreadCollective):
        def all_reduce(self, x: Tensor, op: str) -> Tensor:
            raise Aborted

    broken = Broken(ThreadGroup(2), 0)
    with torch.inference_mode(), pytest.raises(Aborted):
        stage[0].run({"batch": 2, "length": 5}, example(), broken)
    with torch.inference_mode(), pytest.raises(Aborted):
        stage[0].drain({"batch": 2, "length": 5}, broken)
