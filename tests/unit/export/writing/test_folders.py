"""What an export leaves in its folder: all of itself, nothing of what it replaces, everything else."""

import resource
import signal
import subprocess
import sys
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


def test_a_folder_that_can_t_be_written_to_is_told_before_the_tracing() -> None:
    heard: list[str] = []
    with pytest.raises(ExportError, match="the shards can't be written to /proc: "):
        export(nn.Linear(8, 8), ARGS, name="net", out="/proc", progress=lambda what, done, total: heard.append(what))
    assert heard == []


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


ABANDONING = """
import sys
import resource
import signal
import subprocess
import sys
from pathlib import Path
from shardserve.export.writing.write import Writer
writer = Writer(Path(sys.argv[1]), "net")
(writer.folder / "device0").mkdir()
print(flush=True)
sys.stdin.read()
"""


def abandoned(out: Path) -> list[str]:
    return [name for name in names(out) if name.startswith(".")]


def test_what_an_exporter_that_was_killed_has_left_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", ABANDONING, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as exporter:
        assert exporter.stdout is not None
        exporter.stdout.readline()
        [hidden] = abandoned(out)
        write(out, 1)
        assert abandoned(out) == [hidden]  # it lives, and is still writing
        exporter.kill()
        exporter.wait()
    write(out, 1)
    assert names(out) == ["device0"]
    # Former shards that could not be put back are no rubbish.
    kept = out / ".export-kept" / "old" / "device0"
    kept.mkdir(parents=True)
    write(out, 1)
    assert kept.exists()


def test_a_full_disk_is_an_export_error(tmp_path: Path) -> None:
    """A limit on the size of files says it as a full disk does: while the weights are written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"the shards can't be written: .*File too large"):
            export(nn.Linear(64, 64), (torch.randn(2, 64),), name="net", out=tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == []
