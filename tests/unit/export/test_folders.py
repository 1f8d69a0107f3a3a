"""What an export leaves in its folder: all of itself, nothing of what it replaces, everything else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shardserve.errors import ExportError
from shardserve.export import Plan, Report, export
from shardserve.shards.config import ShardConfig

SHARDED = Plan.from_dict({"parameters": {"weight": "Shard(0)", "bias": "Shard(0)"}})
ARGS = (torch.randn(2, 8),)


class Raising(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("out of cheese")


def write(out: Path, ranks: int, name: str = "net") -> Report:
    return export(nn.Linear(8, 8), ARGS, name=name, out=out, tensor_parallel=ranks, plan=SHARDED)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("out", ["model", "a/b/model"])
def test_a_failed_export_leaves_no_folder(tmp_path: Path, out: str) -> None:
    with pytest.raises(ExportError, match="out of cheese"):
        export(Raising(), ARGS, name="net", out=tmp_path / out)
    assert names(tmp_path) == []


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError):
        export(Raising(), ARGS, name="net", out=tmp_path / "empty")
    report = write(tmp_path / "model", 2)
    with pytest.raises(ExportError):
        export(Raising(), ARGS, name="net", out=tmp_path / "model")
    assert names(tmp_path) == ["empty", "model"]
    assert names(tmp_path / "model") == ["device0", "device1"]
    assert ShardConfig.load(tmp_path / "model" / "device1" / "group_config.json").export_id == report.export_id


@pytest.mark.parametrize("name", ["net", "other"])
def test_an_export_of_fewer_ranks_leaves_none_of_those_it_replaces(tmp_path: Path, name: str) -> None:
    write(tmp_path, 4)
    write(tmp_path, 2, name)
    assert names(tmp_path) == ["device0", "device1"]


def test_what_is_not_of_the_export_that_is_replaced_stays(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", 4, "elsewhere")
    write(tmp_path, 2)
    (tmp_path / "elsewhere" / "device3").rename(tmp_path / "device3")
    (tmp_path / "device2").mkdir()
    (tmp_path / "device_notes").mkdir()
    (tmp_path / "notes.txt").touch()
    write(tmp_path, 1)
    assert names(tmp_path) == ["device0", "device2", "device3", "device_notes", "elsewhere", "notes.txt"]


def test_one_rank_is_one(tmp_path: Path) -> None:
    assert "net: 1 rank, 1 pipeline stage, in " in str(write(tmp_path, 1))
    assert "net: 2 ranks, 1 pipeline stage, in " in str(write(tmp_path, 2))


def test_strict_is_about_several_ranks(tmp_path: Path) -> None:
    nothing = Plan()
    export(nn.Linear(8, 8), ARGS, name="net", out=tmp_path / "one", plan=nothing, strict=True)
    with pytest.raises(ExportError, match="the plan shards no parameter: 2 ranks would compute the same"):
        export(nn.Linear(8, 8), ARGS, name="net", out=tmp_path / "two", tensor_parallel=2, plan=nothing, strict=True)
    assert names(tmp_path) == ["one"]
