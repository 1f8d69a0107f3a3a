"""The choice of a layout, planning without weights, and what the report says of stages and ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardserve.amounts import of_bytes
from shardserve.cli import main
from shardserve.cli.options import values
from shardserve.errors import ExportError
from shardserve.export import Plan, export, without_storage
from shardserve.export.layouts.choice import Candidate, ranked
from shardserve.shards.config import ShardConfig

WIDTH = 256
PLAN = Plan({"*.up.weight": "Shard(0)", "*.up.bias": "Shard(0)", "*.down.weight": "Shard(1)"})
BATCH = torch.export.Dim("batch", min=1, max=64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def blocks(count: int = 4) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


def planned(**options: object) -> object:
    return export(
        blocks(),
        (torch.randn(2, WIDTH),),
        name="m",
        out=None,
        plan=PLAN,
        dynamic_shapes=({0: BATCH},),
        **{"tensor_parallel": None, "pipeline_parallel": None, **options},  # type: ignore[arg-type]
    )


BLOCK = 4 * (2 * WIDTH + 2 * 4 * WIDTH * WIDTH + 5 * WIDTH)
MIB = 1024**2


def test_layouts_are_those_of_as_many_ranks_or_fewer() -> None:
    report = planned(ranks=4)
    layouts = {(one.tensor_parallel, one.pipeline_parallel) for one in report.compared}
    assert layouts == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    # Weights have to be read: four ranks read a quarter each.
    assert (report.rank_size, report.stage_size) == (4, 1)
    assert report.compared[0].seconds == report.latency == min(one.seconds for one in report.compared)
    assert "chosen tp 4 x pp 1: " in str(report)
    assert "or tp 1 x pp 4: " in str(report)


def test_what_is_given_is_fixed() -> None:
    report = planned(ranks=6, pipeline_parallel=2)
    assert {(one.tensor_parallel, one.pipeline_parallel) for one in report.compared} == {(1, 2), (2, 2), (3, 2)}
    refused = next(one for one in report.compared if one.tensor_parallel == 3)
    assert "doesn't divide into 3 ranks" in refused.refused
    assert report.rank_size == 4


def test_what_doesnt_fit_is_refused() -> None:
    report = planned(ranks=2, memory_per_device=int(2.6 * BLOCK))
    whole = next(one for one in report.compared if one.ranks == 1)
    assert whole.refused == f"it takes {of_bytes(whole.bytes)}"
    assert whole.parameter_bytes == 4 * BLOCK
    # At the batch of 64: x, its norm, and four times as wide what is between.
    assert 4 * 64 * WIDTH * 6 <= whole.activation_bytes <= 4 * 64 * WIDTH * 12
    assert report.rank_size == 2


def test_the_least_memory_that_would_do() -> None:
    with pytest.raises(ExportError) as caught:
        planned(ranks=2, memory_per_device=MIB)
    needed = min(one.bytes for one in planned(ranks=2).compared)
    assert str(caught.value).startswith(
        "no layout of at most 2 ranks fits into 1.05 MB a device: the least that would do"
    )
    assert of_bytes(needed, up=True) in str(caught.value)
    assert planned(ranks=2, memory_per_device=needed).rank_size == 2


def test_of_alike_layouts_the_smallest_is_taken() -> None:
    def one(tp: int, seconds: float, refused: str = "") -> Candidate:
        return Candidate(tp, 1, 1, 1, seconds, seconds, refused)

    found = ranked([one(8, 0.5, "why"), one(4, 0.97), one(2, 1.0), one(1, 1.2)])
    assert [candidate.tensor_parallel for candidate in found] == [2, 4, 1, 8]
    report = export(nn.Linear(4, 4), (torch.ones(1, 4),), name="m", out=None, ranks=4, tensor_parallel=None)
    assert report.rank_size == 1  # nothing that a collective would be worth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": None}, "tensor_parallel None needs ranks"),
        ({"memory_per_device": 5}, "memory_per_device needs ranks"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        (
            {"ranks": 2, "tensor_parallel": None, "cuts": ("x",)},
            "tp 1 x pp 1: 1 pipeline stages need 0 cuts",
        ),
        ({"ranks": 2, "tensor_parallel": 4}, "no layout of at most 2 ranks is possible: tp and pp are too large"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(nn.Linear(4, 4), (torch.ones(1, 4),), name="m", out=None, **options)


def test_the_report_has_what_is_written(tmp_path: Path) -> None:
    model, x, shapes = blocks(2), (torch.randn(2, WIDTH),), ({0: BATCH},)
    report = export(
        model, x, name="m", out=tmp_path, tensor_parallel=2, pipeline_parallel=2, plan=PLAN, dynamic_shapes=shapes
    )
    for rank in range(4):
        written = ShardConfig.load(tmp_path / f"device{rank}" / "group_config.json")
        held = report.stages[rank // 2].ranks[rank % 2]
        assert held.parameter_bytes == written.parameter_bytes == 4 * held.parameters
        assert held.flops == 2 * 2 * WIDTH * 4 * WIDTH
    first, last = report.stages
    assert first.collectives == last.collectives == ("all_reduce",)
    assert first.collective_bytes == (4 * 2 * WIDTH,)
    assert first.send_bytes == (4 * 2 * WIDTH,)
    assert first.replicated == pytest.approx(4 * 3 * WIDTH / BLOCK)
    assert "1 all_reduce (2.05 kB); a rank has " in str(report)
    assert f"sends {first.sends[0].name}: float32 [batch, {WIDTH}] (2.05 kB)" in str(report)
    assert report.latency > report.interval > 0


def test_without_values_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"name": "m", "tensor_parallel": 2, "pipeline_parallel": 2, "plan": PLAN}
    real = export(blocks(), (torch.randn(2, WIDTH),), out=tmp_path / "out", **options)
    with torch.device("meta"):
        model, x = blocks(), torch.randn(2, WIDTH)
    assert model[0].up.weight.is_meta
    meta = export(model, (x,), out=None, **options)
    with without_storage():
        empty = blocks()
    again = export(empty, (torch.randn(2, WIDTH),), out=None, **options)
    assert [str(stage) for stage in meta.stages] == [str(stage) for stage in real.stages]
    assert [str(stage) for stage in again.stages] == [str(stage) for stage in real.stages]
    assert "nothing written" in str(meta)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MODULE = """
import torch
from torch import nn

class Huge(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40000, 40000) for _ in range(4))
        self.register_buffer("scale", torch.linspace(0, 1, 3))
        self.half = self.scale[1].item()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * self.half
        return x

def huge():
    return Huge(), (torch.randn(2, 40000),), {"weights": "nowhere.safetensors"}
"""


def test_the_command_plans_what_has_no_weights_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hugeland.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    words = ["export", "hugeland:huge", "--name", "m", "--meta", "--ranks", "4", "--memory-per-device", "7GiB"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "chosen tp 4 x pp 1: 6.4 GB" in out
    assert "or tp 2 x pp 1: 12.8 GB" in out
    assert "refused: it takes 12.8 GB" in out
    assert main([*words[:-1], "5GiB"]) == 1
    assert "the least that would do is 6.41 GB, with tp" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["hugeland.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--out DIR says where to write"),
        (("--meta", "--verify"), "--meta writes nothing"),
        (("--out", "m", "--tp", "auto"), "--tp auto needs --ranks N"),
        (("--out", "m", "--memory-per-device", "1GiB"), "--memory-per-device needs --ranks N"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere:f", "--name", "m", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1 parsec", "0.1B", "-1GiB", "GiB", "1e3", ""])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="isn't a size as 16GiB, 500MB or 1000"):
        values.memory(size)


def test_sizes() -> None:
    assert [values.memory(text) for text in ("1000", "1KiB", "1.5 kb", "16GiB")] == [1000, 1024, 1500, 16 * 1024**3]
