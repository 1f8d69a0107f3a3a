"""What the chaos tests serve: a transformer on 2 x 2 ranks, a model whose steps take as long as they shall, one
that dies of an input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import dividing, slow
from serving import Transformer, Up, shared_memory_files, write_servable

from shardserve.export import Plan, export
from shardserve.worker.rank_table import make_rank_table


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer(tmp_path_factory.mktemp("transformer"))


@pytest.fixture(scope="module")
def up(transformer: Transformer) -> Iterator[Up]:
    """One server for all deaths that it has to survive as it is, with every default; after them it can be stopped."""
    with transformer.up() as up:
        yield up
        assert up.stop() == 0


class Slow:
    """tests/models/slow.py on two tensor-parallel ranks."""

    def __init__(self, folder: Path) -> None:
        self.model = slow.Slow().eval()
        self.folder = write_servable(folder, "slow", "rank_size=2, stage_size=1, with_batch_dim=False", "x", "y")
        export(
            self.model,
            slow.EXAMPLE,
            name="slow",
            out=folder / "model",
            tensor_parallel=2,
            plan=Plan(slow.PLAN),
            dynamic_shapes=slow.DYNAMIC_SHAPES,
            output_names=["y"],
        )

    def up(self, **environment: str) -> Up:
        return Up(self.folder, self.folder / "model", "slow", **environment)


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    return Slow(tmp_path_factory.mktemp("slow"))


class Dividing:
    """tests/models/dividing.py in two replicas of one rank."""

    def __init__(self, folder: Path) -> None:
        self.model = dividing.Dividing().eval()
        self.folder = write_servable(folder, "dividing", "rank_size=1, stage_size=1", "x, n, d", "y, quotient")
        export(
            self.model,
            dividing.EXAMPLE,
            name="dividing",
            out=folder / "model",
            dynamic_shapes=dividing.DYNAMIC_SHAPES,
            output_names=["y", "quotient"],
        )
        self.table = folder / "ranks.json"
        self.table.write_text(json.dumps(make_rank_table([("127.0.0.1", [0, 1])])))

    def up(self, **environment: str) -> Up:
        arguments = ("--rank-table", str(self.table))
        return Up(self.folder, self.folder / "model", "dividing", *arguments, **environment)


@pytest.fixture(scope="session")
def dividing_model(tmp_path_factory: pytest.TempPathFactory) -> Dividing:
    return Dividing(tmp_path_factory.mktemp("dividing"))


@pytest.fixture(autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    before = shared_memory_files()
    yield
    assert shared_memory_files() <= before
