"""Operators between a pair of layers that are cut: each works on its part, so that the pair costs one all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.pairs import Pairs
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify
from shardserve.export.sharding.placements import Shard
from shardserve.export.sharding.rules import RULES

BATCH = Dim("batch", min=1, max=5)


class Pair(nn.Module):
    """Two layers with what a test does between them; the width is cut: the last dim, or that of channels."""

    def __init__(self, between: Callable[[Tensor], Tensor], convolutions: bool = False) -> None:
        super().__init__()
        self.between, self.convolutions = between, convolutions
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.conv_up, self.conv_down = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 8, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.instance = nn.InstanceNorm1d(16, affine=True)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv1d(16, 32, 3, padding=1, groups=4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, x: Tensor) -> Tensor:
        first, last = (self.conv_up, self.conv_down) if self.convolutions else (self.up, self.down)
        return last(self.between(first(x)))


def check(
    model: nn.Module, x: Tensor, plan: dict[str, str], tmp_path: Path, expected: dict[str, int], ranks: int = 2
) -> None:
    report = export(
        model, (x,), name="m", out=tmp_path, tensor_parallel=ranks, plan=Plan(plan), dynamic_shapes=({0: BATCH},)
    )
    assert dict(report.collectives()) == expected
    assert not report.gathered
    result = verify(model, (x,), None, tmp_path, "m", atol=1e-4, rtol=1e-4)
    assert result.passed, result


IDS = torch.tensor([2, 0, 1, 2])


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.repeat_interleave(2, 1),
        lambda y: y.repeat(1, 3, 1),
        lambda y: y.flip([1]),
        lambda y: y.roll(1, 1),
        lambda y: F.pad(y, (0, 0, 1, 2)),
        lambda y: F.pad(y, (0, 0, 1, 2), mode="reflect"),
        lambda y: y[:, IDS],
        lambda y: y[:, IDS[:, None], :],
        lambda y: y.index_select(1, IDS),
        lambda y: y.gather(1, y.argsort(1)),
        lambda y: y.sort(1).values,
        lambda y: y.topk(2, 1).values,
        lambda y: y.cummax(1).values,
        lambda y: y.max(1).values + y.std(1),
        lambda y: y.double().cumsum(1).type_as(y) + torch.ones(16).type_as(y),
        lambda y: torch.max(y, -y),
        lambda y: y.norm(dim=1),
        lambda y: y.transpose(1, 2).unsqueeze(2).expand(-1, -1, 3, -1).tril().sum(2).transpose(1, 2),
    ],
)
def test_beside_the_cut_dim(tmp_path: Path, between: Callable[[Tensor], Tensor]) -> None:
    plan = {"up.*": "Shard(0)", "down.weight": "Shard(1)"}
    check(Pair(between), torch.randn(2, 3, 8), plan, tmp_path, {"all_reduce": 1})


@pytest.mark.parametrize("times", [2, 3])
def test_copies_along_the_cut_dim(tmp_path: Path, times: int) -> None:
    """Copies one after another are blocks, of each of which a rank has its part; each element several times isn't."""
    plan = {"up.*": "Shard(0)"}
    weight = torch.randn(4, 16 * times)
    for folder, between in (
        ("repeat", lambda y: F.linear(y.repeat(1, 1, times), weight)),
        ("interleave", lambda y: F.linear(y.repeat_interleave(times, -1), weight)),
    ):
        model = Pair(between)
        model.down = nn.Linear(4, 4)
        check(model, torch.randn(2, 3, 8), plan, tmp_path / folder, {"all_reduce": 1})


@pytest.mark.parametrize("layer", ["norm", "instance", "depthwise"])
def test_channels(tmp_path: Path, layer: str) -> None:
    model = Pair(lambda y: getattr(model, layer)(y), convolutions=True)
    plan = {"conv_up.*": "Shard(0)", "conv_down.weight": "Shard(1)"}
    check(model, torch.randn(2, 8, 6), plan, tmp_path, {"all_reduce": 1})


def test_groups_of_channels(tmp_path: Path) -> None:
    model = Pair(lambda y: model.grouped(y), True)
    model.conv_down = nn.Conv1d(32, 8, 1)
    plan = {"conv_up.*": "Shard(0)", "grouped.*": "Shard(0)", "conv_down.weight": "Shard(1)"}
    check(model, torch.randn(2, 8, 6), plan, tmp_path, {"all_reduce": 1})


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
def test_as_many_groups_as_ranks(layer: type[nn.Conv1d | nn.ConvTranspose1d], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 1), layer(16, 32, 3, groups=4), nn.BatchNorm1d(32), nn.Conv1d(32, 8, 1))
    plan = {**dict.fromkeys(("0.*", "1.*", "2.[!n]*"), "Shard(0)"), "3.weight": "Shard(1)"}
    for ranks in (2, 4):
        check(model.eval(), torch.randn(2, 8, 6), plan, tmp_path / str(ranks), {"all_reduce": 1}, ranks)


def test_fewer_groups_than_ranks(tmp_path: Path) -> None:
    """A rank makes its part of a group's channels from all that the group takes."""
    model = nn.Sequential(nn.Conv1d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv1d(16, 8, 1))
    plan = {"0.*": "Shard(0)", "2.weight": "Shard(1)"}
    check(model, torch.randn(2, 8, 6), plan, tmp_path, {"all_reduce": 1}, ranks=4)


@pytest.mark.parametrize(
    "norm",
    [
        lambda y: F.normalize(y, dim=-1),
        lambda y: y * y.norm(p=1, dim=(1, 2), keepdim=True),
        lambda y: y * y.norm(p=float("inf"), dim=-1, keepdim=True),
        lambda y: y * y.relu().norm(p=0, dim=-1, keepdim=True),
        lambda y: y * torch.linalg.vector_norm(y, ord=2.5),
        lambda y: y * torch.linalg.norm(y, dim=-1, keepdim=True),
        lambda y: y * torch.linalg.norm(y, dim=1, keepdim=True).norm(),
        lambda y: y / torch.full_like(y, 300.0).half().norm(dim=-1, keepdim=True),  # its square is beyond float16
    ],
)
def test_norms_over_what_is_cut(norm: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Each rank's own, and one reduction of those; the layer after takes the parts."""
    plan = {"up.*": "Shard(0)", "down.weight": "Shard(1)"}
    check(Pair(norm), torch.randn(2, 3, 8) / 2, plan, tmp_path, {"all_reduce": 2})


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode: str, tmp_path: Path) -> None:
    """By columns, which the layer after takes as they are."""
    model = nn.Sequential(nn.EmbeddingBag(10, 8, mode=mode, padding_idx=1), nn.Linear(8, 4))
    check(model, torch.randint(0, 10, (3, 5)), {"0.weight": "Shard(1)", "1.weight": "Shard(1)"}, tmp_path,
          {"all_reduce": 1})  # fmt: skip


@pytest.mark.parametrize(("dim", "collective"), [(0, "all_reduce"), (1, "all_gather")])
def test_transposed_convolution(tmp_path: Path, dim: int, collective: str) -> None:
    model = nn.ConvTranspose1d(8, 16, 3, 2)
    plan = {"weight": f"Shard({dim})"}
    check(model, torch.randn(2, 8, 6), plan, tmp_path, {collective: 1})


def test_a_whole_convolution_after_one_that_is_cut(tmp_path: Path) -> None:
    """It takes its part of the weight, instead of gathering the activation."""
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.ConvTranspose1d(16, 8, 3), nn.Conv1d(8, 4, 1))
    check(model, torch.randn(2, 8, 6), {"0.*": "Shard(0)"}, tmp_path, {"all_reduce": 1})


def test_parametrized_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 8))
    plan = {"0.parametrizations.weight.*": "Shard(0)", "0.bias": "Shard(0)", "2.weight": "Shard(1)"}
    check(model, torch.randn(2, 8), plan, tmp_path, {"all_reduce": 1})


def test_a_weight_with_one_norm(tmp_path: Path) -> None:
    """Over all dims, it isn't a rank's part's: the weight is gathered."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16), dim=None)
    x = torch.randn(2, 8)
    for folder, plan in (("auto", None), ("given", Plan({"parametrizations.weight.original1": "Shard(0)"}))):
        export(model, (x,), name="m", out=tmp_path / folder, tensor_parallel=2, plan=plan)
        assert verify(model, (x,), None, tmp_path / folder, "m", atol=1e-4, rtol=1e-4).passed


class With(nn.Module):
    """What a function makes of the input and two parameters."""

    def __init__(self, first: tuple[int, ...], second: tuple[int, ...], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(shape)) for shape in (first, second))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.first, self.second)


@pytest.mark.parametrize(
    ("model", "placement"),
    [
        (With((4, 3), (1, 8), lambda x, a, b: x @ torch.einsum("bi,bj->bij", a, b).sum(1).T), "Shard(0)"),
        (With((4, 3), (1, 8), lambda x, a, b: x * torch.einsum("bi,bj->j", a, b)), "Shard(0)"),
        (With((8, 4), (1,), lambda x, a, b: torch.addmm(b, x, a)), "Shard(1)"),
        (With((4, 8), (1,), lambda x, a, b: F.linear(x, a, b)), "Shard(0)"),
        (With((8,), (), lambda x, a, b: F.linear(x, a) + b), "Shard(0)"),
    ],
    ids=["einsum", "einsum_contracted", "addmm", "linear", "one_row"],
)
def test_broadcast_beside_what_is_cut(tmp_path: Path, model: nn.Module, placement: str) -> None:
    x = torch.randn(2, 8)
    export(model, (x,), name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"first": placement}))
    assert verify(model, (x,), None, tmp_path, "m", atol=1e-4, rtol=1e-4).passed


def test_a_rule_that_leaves_what_does_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the exporter's own rules says at which operator, in which module."""
    monkeypatch.setitem(RULES, "relu", lambda emitter, call: call.emit(emitter, Shard(0)))
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    message = (
        r"operator aten.relu.default \('relu'\) \(module '1'\): \[3, 4\] as Shard\(0\) doesn't divide into 2 ranks"
    )
    with pytest.raises(ExportError, match=message):
        export(model, (torch.randn(3, 8),), name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"0.*": "Shard(0)"}))


class Experts(nn.Module):
    """A mixture of gated layers, each token's matrices looked up by its experts' numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.gate_up = nn.Parameter(torch.randn(4, 32, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        flat = chosen.flatten()
        hidden = torch.bmm(self.gate_up[flat], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)
        gate, up = hidden.chunk(2, -1)
        given = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (given * weights.flatten()[:, None]).view(-1, 2, 8).sum(1)


def test_experts(tmp_path: Path) -> None:
    plan = {"gate_up": "Shard(1, blocks=2)", "down": "Shard(2)"}
    check(Experts(), torch.randn(2, 8), plan, tmp_path, {"all_reduce": 1})


class Across(nn.Module):
    """What the first stage makes is added to the second's pending sum, and used nowhere else."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.side, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.second = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        return self.last(self.second(self.first(x)) + self.between(side))


@pytest.mark.parametrize("between", [lambda side: side, torch.relu], ids=["itself", "made_from_it"])
def test_ranks_agree_on_what_crosses_a_cut(tmp_path: Path, between: Callable[[Tensor], Tensor]) -> None:
    """A term that one rank alone adds to a pending sum crosses to the others too."""
    plan = Plan({"second.0.*": "Shard(0)", "second.2.weight": "Shard(1)"}, ("second",))
    piped(Across(between), torch.randn(2, 8), plan, tmp_path, {"all_reduce": 1})


class Positions(nn.Module):
    """The pending sum is of parameters alone, what joins it depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(10, 8), nn.Embedding(4, 8)
        self.register_buffer("ids", torch.arange(3))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wte(x) + self.wpe(self.ids))


def test_ranks_agree_on_what_depends_on_the_input(tmp_path: Path) -> None:
    plan = Plan({"wpe.weight": "Shard(0)"}, ("last",))
    piped(Positions(), torch.randint(10, (3,)), plan, tmp_path, {"all_reduce": 1})


class Bias(nn.Module):
    """A layer of parameters alone, but for its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.x, self.weight = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.x, self.weight, self.bias(x)))


def test_ranks_agree_on_a_bias_that_depends_on_the_input(tmp_path: Path) -> None:
    piped(Bias(), torch.randn(8), Plan({"weight": "Shard(1)"}, ("last",)), tmp_path, {"all_reduce": 1})


@pytest.mark.parametrize(
    ("last", "dim"),
    [(nn.Conv1d(16, 8, 1), 1), (nn.ConvTranspose1d(16, 8, 1), 0)],
    ids=["convolution", "transposed_convolution"],
)
def test_ranks_agree_on_a_bias_of_channels_that_is_cut(tmp_path: Path, last: nn.Module, dim: int) -> None:
    """The first alone adds it, and all gather it."""
    plan = {"0.*": "Shard(0)", "1.weight": f"Shard({dim})", "1.bias": "Shard(0)"}
    net = nn.Sequential(nn.Conv1d(8, 16, 3), last)
    check(net, torch.randn(2, 8, 6), plan, tmp_path, {"all_gather": 1, "all_reduce": 1})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: F.linear(x, a, b),
        lambda x, a, b: torch.addmm(b, x, a.T),
        lambda x, a, b: F.linear(x, a) + torch.diag(b).sum(0).expand(3, 8),
    ],
    ids=["linear", "addmm", "added"],
)
def test_ranks_agree_on_a_term_of_parameters_that_are_cut(
    tmp_path: Path, function: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    plan = Plan({"first": "Shard(1)", "second": "Shard(0)"})
    net, x = With((8, 8), (8,), function), torch.randn(3, 8)
    report = export(net, (x,), name="m", out=tmp_path, tensor_parallel=2, plan=plan)
    assert dict(report.collectives()) == {"all_gather": 1, "all_reduce": 1}
    assert verify(net, (x,), None, tmp_path, "m", atol=1e-4, rtol=1e-4).passed


class Twice(Pairs):
    """What joins a pending sum has needed a reduction of its own, and is used nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (down(torch.relu(up(x))) for up, down in zip(self.ups, self.downs, strict=True))
        return second + self.norm(first)


def test_ranks_agree_on_collectives(tmp_path: Path) -> None:
    plan = {"ups.*": "Shard(0)", "downs.*.weight": "Shard(1)"}
    check(Twice(2), torch.randn(2, 8), plan, tmp_path, {"all_reduce": 2})


def piped(model: nn.Module, x: Tensor, plan: Plan, tmp_path: Path, expected: dict[str, int]) -> None:
    report = export(model, (x,), name="m", out=tmp_path, tensor_parallel=2, pipeline_parallel=2, plan=plan)
    assert dict(report.collectives()) == expected
    assert verify(model, (x,), None, tmp_path, "m", atol=1e-4, rtol=1e-4).passed
