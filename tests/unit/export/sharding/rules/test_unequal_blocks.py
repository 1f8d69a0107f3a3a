"""A fused projection of queries, keys and values of unequal sizes, cut by heads: one all-reduce, from the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.fused import Apart, Fused, by_heads, by_slices, by_slices_of_heads, by_split, keys_and_values_together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardserve.cli import main
from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify, without_storage
from shardserve.export.sharding.placements import Shard, parse_placement
from shardserve.shards.config import ShardConfig

from ...conftest import alter_weight

BLOCKS = "Shard(0, blocks=(16, 8, 8))"
PLAN = {"qkv.*": BLOCKS, "o.weight": "Shard(1)"}
X = torch.randn(2, 5, 16)


def run(net: nn.Module, plan: dict[str, str], collectives: dict[str, int], out: Path, x: Tensor = X) -> None:
    report = export(net, (x,), name="m", out=out, tensor_parallel=2, plan=Plan(plan))
    assert dict(report.collectives()) == collectives
    assert verify(net, (x,), None, out, "m", atol=1e-5, rtol=1e-5).passed


def test_placements() -> None:
    placement = parse_placement(BLOCKS, "")
    assert placement == Shard(0, (16, 8, 8))
    assert str(placement) == BLOCKS
    assert Shard(0, (8, 8, 8)) == Shard(0, 3)
    assert placement.divides(32, 8)
    assert not placement.divides(32, 16)
    assert not placement.divides(64, 2)
    assert placement.within(32, 16, 32) == Shard(0, 2)
    assert placement.within(32, 0, 24) == Shard(0, (16, 8))
    assert placement.within(32, 0, 8) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Shard(0, blocks=(16, 8))", r"has size 32, which doesn't divide into blocks of sizes \(16, 8\) on 2 ranks"),
        ("Shard(0, blocks=(17, 8, 7))", r"blocks of sizes \(17, 8, 7\) on 2 ranks"),
        ("Shard(0, blocks=(16, 0, 16))", "is not a placement"),
        ("Shard(0, blocks=(32))", "is not a placement"),
    ],
)
def test_what_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(Fused(), (X,), name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"qkv.weight": text}))


@pytest.mark.parametrize("apart", [by_split, by_slices, by_heads, by_slices_of_heads, keys_and_values_together])
def test_attention_is_cut_by_heads(apart: Apart, tmp_path: Path) -> None:
    run(Fused(apart), PLAN, {"all_reduce": 1}, tmp_path)


class Between(nn.Module):
    """What a test does with the fused values, along and beside the cut dim."""

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: int = 32) -> None:
        super().__init__()
        self.qkv, self.o, self.function = nn.Linear(16, 32), nn.Linear(inputs, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.function(self.qkv(x)))


TABLE = torch.randn(32)


def channels(y: Tensor, groups: int) -> Tensor:
    return F.conv1d(y.mT, TABLE.view(groups, -1, 1).repeat_interleave(32 // groups, 0), groups=groups).mT


@pytest.mark.parametrize(
    ("function", "collectives"),
    [
        (lambda y: y * TABLE, {"all_reduce": 1}),
        (lambda y: y.repeat_interleave(2, -1)[..., 32:], {"all_reduce": 1}),
        (lambda y: y.repeat(1, 1, 2)[..., 16:48], {"all_reduce": 1}),
        (lambda y: y.unflatten(-1, (2, 16)).flatten(-2), {"all_gather": 1}),
        (lambda y: y.cumsum(-1), {"all_gather": 1}),
        (lambda y: y[..., 4:] + y[..., :-4], {"all_gather": 1}),
        (lambda y: y.split([20, 12], -1)[0], {"all_gather": 1}),
        (lambda y: channels(y, 32), {"all_reduce": 1}),
        (lambda y: channels(y, 8), {"all_reduce": 1}),
        (lambda y: channels(y, 4), {"all_gather": 1}),
        (lambda y: F.group_norm(y.mT, 4).mT, {"all_gather": 1}),
    ],
)
def test_between(function: Callable[[Tensor], Tensor], collectives: dict[str, int], tmp_path: Path) -> None:
    inputs = function(torch.zeros(1, 1, 32)).shape[-1]
    run(Between(function, inputs), {"qkv.*": BLOCKS}, collectives, tmp_path)


def test_repeated_a_dynamic_number_of_times(tmp_path: Path) -> None:
    """Blocks of unequal sizes have sizes that are numbers: what comes to others is gathered first."""
    net = Between(lambda y: y.repeat_interleave(y.shape[0], -1).unflatten(-1, (32, -1)).sum(-1))
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=4)}}
    report = export(
        net, (X,), name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"qkv.*": BLOCKS}), dynamic_shapes=dynamic
    )
    assert dict(report.collectives()) == {"all_gather": 1}
    assert verify(net, (X,), None, tmp_path, "m", atol=1e-5, rtol=1e-5).passed


def test_weights_from_files_and_what_inspect_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, file, out = Fused(), tmp_path / "w.safetensors", tmp_path / "m"
    save_file(dict(whole.state_dict()), file)
    with without_storage():
        net = Fused()
    export(net, (X,), name="m", out=out, tensor_parallel=2, plan=Plan(PLAN), weights=file)
    assert verify(whole, (X,), None, out, "m", atol=1e-5, rtol=1e-5).passed
    for rank in range(2):
        rows = [
            *range(8 * rank, 8 * rank + 8),
            *range(16 + 4 * rank, 20 + 4 * rank),
            *range(24 + 4 * rank, 28 + 4 * rank),
        ]
        assert torch.equal(
            load_file(out / f"device{rank}" / "weights.safetensors")["qkv.weight"], whole.qkv.weight[rows]
        )
    assert main(["inspect", str(out)]) == 0
    assert "1 all_reduce" in capsys.readouterr().out


def test_what_crosses_a_cut_and_whose_weights_are_wrong(tmp_path: Path) -> None:
    """A rank's part of unequal blocks is the model's: as what it sends, and as its weight."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    plan = Plan({"0.*": BLOCKS, "1.weight": "Shard(1, blocks=(16, 8, 8))"}, ("1",))
    export(net, (X,), name="m", out=tmp_path, tensor_parallel=2, pipeline_parallel=2, plan=plan)
    assert verify(net, (X,), None, tmp_path, "m", atol=1e-5, rtol=1e-5).passed
    (origin,) = ShardConfig.load(tmp_path / "device0" / "group_config.json").origins
    assert origin.placement == "Shard(2, blocks=(16, 8, 8))"
    alter_weight(tmp_path, 3, "1.weight")
    said = verify(net, (X,), None, tmp_path, "m").parting
    assert said.startswith("they part in pipeline stage 1, the last: what comes to it is right")
    assert said.endswith("its weights that aren't the model's: '1.weight' on rank 3")
    alter_weight(tmp_path, 1, "0.bias")
    said = verify(net, (X,), None, tmp_path, "m").parting
    assert said.startswith("they part in pipeline stage 0: 'linear'")
    assert said.endswith("on rank 1; its weights that aren't the model's: '0.bias' on rank 1")
