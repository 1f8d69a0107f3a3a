from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from models.fused import Apart, Fused, by_heads, by_slices, by_slices_of_heads, by_split, keys_and_values_together
from models.zoo import CASES
from torch import Tensor, nn

from shardserve.export import Plan, Report, export, verify
from shardserve.export.planning import find
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.tracing.trace import Trace, trace

from ..conftest import PLAN, transformer


def traced(model: nn.Module, *args: Tensor) -> Trace:
    return trace(model.eval(), args, {}, None, None, None)


def found(model: nn.Module, *args: Tensor, size: int = 2) -> dict[str, str]:
    return {name: str(placement) for name, placement in find(traced(model, *args), size).placements.items()}


def exported(model: nn.Module, args: tuple[Tensor, ...], out: Path, size: int = 2, **options: object) -> Report:
    report = export(model, args, name="m", out=out, tensor_parallel=size, **options)  # type: ignore[arg-type]
    assert verify(model, args, None, out, "m", atol=1e-5, rtol=1e-5).passed
    return report


@pytest.mark.parametrize("size", [2, 4])
def test_a_transformer_is_cut_as_by_hand(tmp_path: Path, size: int) -> None:
    model, args, _ = transformer(blocks=2)
    report = exported(model, args, tmp_path / "auto", size)
    by_hand = exported(model, args, tmp_path / "hand", size, plan=PLAN)
    blocks = {name: text for name, text in report.plan.parameters.items() if name.startswith("blocks.")}
    hand = Plan({name: text for name, text in PLAN.parameters.items() if name.startswith("blocks.")})
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert Plan(blocks).placements(shapes, size) == hand.placements(shapes, size)
    assert report.collectives()["all_reduce"] <= by_hand.collectives()["all_reduce"]
    assert report.collectives()["all_gather"] == 1  # of the logits: that plan leaves the head whole
    assert report.stages[0].parameter_bytes[0] <= by_hand.stages[0].parameter_bytes[0]


@pytest.mark.parametrize("name", CASES)
def test_no_more_collectives_than_by_hand(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    report = export(case.model, case.args, name="m", out=tmp_path, tensor_parallel=2, kwargs=case.kwargs)
    if case.collectives:
        assert sum(report.collectives().values()) <= sum(case.collectives.values())
    assert verify(case.model, case.args, case.kwargs, tmp_path, "m", atol=1e-5, rtol=1e-5).passed


def test_the_plan_of_the_report_gives_the_same_again(tmp_path: Path) -> None:
    model, args, _ = transformer(blocks=2)
    report = exported(model, args, tmp_path / "a")
    again = exported(model, args, tmp_path / "b", plan=report.plan)
    assert again.collectives() == report.collectives()
    assert [stage.parameter_bytes for stage in again.stages] == [stage.parameter_bytes for stage in report.stages]
    assert "blocks.*.up.weight" in report.plan.parameters
    assert "Shard(0): " in str(report)
    assert again.replicated is None


def test_what_a_plan_names_stays_and_the_rest_is_found(tmp_path: Path) -> None:
    model, args, _ = transformer(blocks=2)
    given = {"blocks.*.up.*": "Replicate()", "blocks.*.down.*": "Replicate()", "tokens.weight": "Shard(0)"}
    report = exported(model, args, tmp_path, plan=Plan(given, auto=True))
    parameters = report.plan.parameters
    assert parameters["blocks.*.attention.query.weight"] == "Shard(0)"
    assert parameters["tokens.weight"] == "Shard(0)"
    assert not [name for name in parameters if ".up." in name or ".down." in name]


class Heads(nn.Module):
    """Attention of a few heads, and a perceptron."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, width = heads, 8 * heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 128), nn.Linear(128, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(torch.relu(self.up(x)))


def test_fused_projections_are_cut_in_blocks() -> None:
    placements = found(Heads(4), torch.randn(2, 5, 32))
    assert placements["qkv.weight"] == placements["qkv.bias"] == "Shard(0, blocks=3)"
    assert placements["o.weight"] == placements["down.weight"] == "Shard(1)"


@pytest.mark.parametrize("apart", [by_split, by_slices, by_heads, by_slices_of_heads, keys_and_values_together])
def test_fused_projections_of_unequal_parts_are_cut_by_heads(apart: Apart) -> None:
    blocks = "Shard(0, blocks=(16, 8, 8))"
    assert found(Fused(apart), torch.randn(2, 5, 16)) == {
        "qkv.weight": blocks, "qkv.bias": blocks, "o.weight": "Shard(1)"
    }  # fmt: skip


def test_heads_that_dont_divide_stay_whole_and_are_named() -> None:
    result = find(traced(Heads(3), torch.randn(2, 5, 24)), 2)
    assert set(result.placements) == {"up.weight", "up.bias", "down.weight"}
    reason = next(line for line in result.replicated if line.startswith("qkv.weight"))
    assert "3 (of 72 as [3, 3, 8]) doesn't divide into 2 ranks" in reason


def test_an_odd_shape_is_named() -> None:
    result = find(traced(nn.Linear(5, 7), torch.randn(2, 5)), 2)
    assert not result.placements
    assert result.replicated[0].endswith("7 and 5 don't divide into 2 ranks")


class Twice(nn.Module):
    """One module called twice, one that is used in another way, and a stack whose layers depend on their number."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.chain = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x) + x
        x = self.block(x) + x
        for layer in self.chain:
            x = torch.tanh(layer(x))
        return x


def test_one_module_called_twice_and_layers_in_turn() -> None:
    probed = found(Twice(), torch.randn(2, 16))
    assert (probed["block.0.weight"], probed["block.2.weight"]) == ("Shard(0)", "Shard(1)")
    chain = [probed[f"chain.{index}.weight"] for index in range(4)]
    assert chain == ["Shard(0)", "Shard(1)", "Shard(0)", "Shard(1)"]


def test_layers_after_a_large_embedding_are_cut_too() -> None:
    """One collective halves the embedding, most of all bytes; the layers' spare the FLOPs, of which it has none."""
    layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6)]
    placements = found(nn.Sequential(nn.Embedding(4096, 32), *layers), torch.zeros(2, 5, dtype=torch.int64))
    assert placements["0.weight"] == "Shard(0)"
    assert {placements.get(f"{layer}.2.weight") for layer in range(1, 7)} == {"Shard(1)"}


def test_it_is_deterministic() -> None:
    trace = traced(Heads(4), torch.randn(2, 5, 32))
    first, second = (find(trace, 2) for _ in range(2))
    assert list(first.placements.items()) == list(second.placements.items())
    assert first.replicated == second.replicated


def test_fixed_placements() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    fixed = {"0.weight": Replicate(), "2.weight": Shard(0)}
    placements = find(traced(model, torch.randn(2, 16)), 2, fixed).placements
    assert placements.get("0.weight") is None
    assert placements["2.weight"] == Shard(0)
    assert Counter(map(str, placements.values()))["Shard(1)"] == 0


class Beside(nn.Module):
    """Attention's two matrices beside a perceptron of 16 times their size, and a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 1024), nn.Linear(1024, 32)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.pool = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.b(torch.tanh(self.a(x)))
        return torch.tanh(self.pool(x[:, 0]))


def test_what_is_much_of_what_is_left_is_cut_and_a_pooler_is_not() -> None:
    """On 2 ranks the small pair is little; on 8, without it, a rank would have half as much again as its share."""
    x = torch.randn(2, 64, 32)
    assert "a.weight" not in found(Beside(), x)
    placements = found(Beside(), x, size=8)
    assert (placements["a.weight"], placements["b.weight"]) == ("Shard(0)", "Shard(1)")
    assert "pool.weight" not in placements


def test_weights_are_never_gathered() -> None:
    """Experts looked up by number: the dim of the experts can't be cut, that of what is inside can."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 16, 8))
            self.down = nn.Parameter(torch.randn(4, 8, 16))

        def forward(self, x: Tensor, expert: Tensor) -> Tensor:
            hidden = torch.relu(torch.bmm(self.up[expert], x[..., None]))
            return torch.bmm(self.down[expert], hidden).squeeze(-1)

    placements = found(Experts(), torch.randn(5, 8), torch.tensor([0, 3, 1, 1, 2]))
    assert placements == {"up": "Shard(1)", "down": "Shard(2)"}
