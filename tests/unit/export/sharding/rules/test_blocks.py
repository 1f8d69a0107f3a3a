"""Blocks of a cut dim that are taken apart, and sums that go on pending: counted, run from the files and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.pairs import Pairs
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import Plan, VerifyResult, export, verify


class Net(nn.Module):
    """Two layers with a function between."""

    def __init__(self, between: Callable[[Tensor], Tensor], inner: int = 16, after: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(after, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


PAIR = {"up.*": "Shard(0)", "down.weight": "Shard(1)"}
GATED = {"up.*": "Shard(0, blocks=2)", "down.weight": "Shard(1)"}


def by_slices(x: Tensor) -> Tensor:
    return x[..., :16] * torch.sigmoid(x[..., 16:])


def by_unbind(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, 16)).unbind(-2)
    return first * second


def heads_repeated(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 4)).repeat_interleave(2, dim=-2).flatten(-2)


def repeated_to_a_size(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 4)).repeat_interleave(2, dim=-2, output_size=8).flatten(-2)


@pytest.mark.parametrize(
    ("net", "plan"),
    [
        (Net(by_slices, inner=32), GATED),
        (Net(by_unbind, inner=32), GATED),
        (Net(F.glu, inner=32), GATED),
        (Net(heads_repeated, after=32), PAIR),
        (Net(repeated_to_a_size, after=32), PAIR),
    ],
    ids=["slices", "unbind", "glu", "repeat_interleave", "repeat_interleave_to_a_size"],
)
def test_what_is_between_two_layers_stays_sharded(net: Net, plan: dict[str, str], tmp_path: Path) -> None:
    run(net, plan, {"all_reduce": 1}, tmp_path, torch.randn(2, 5, 8))


def test_a_slice_that_begins_before_the_dim(tmp_path: Path) -> None:
    net = Net(lambda x: x[..., -48:16], inner=32)
    run(net, GATED, {"all_reduce": 1}, tmp_path, torch.randn(2, 8))


@pytest.mark.parametrize("dims", [(1,), (1, 2)], ids=["the_cut_dim", "another_too"])
def test_squeezed_where_a_rank_has_one(dims: tuple[int, ...], tmp_path: Path) -> None:
    """The cut dim is as long as there are ranks: of size 1 on each, but not in the model."""

    def between(x: Tensor) -> Tensor:
        x = x.view(3, 2, 1, 8).squeeze(dims)
        return x.flip(x.ndim - 1).reshape(3, 16)

    run(Net(between), PAIR, {"all_reduce": 1}, tmp_path, torch.randn(3, 8))


class Then(nn.Module):
    """A function of what two layers make."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.after = Net(torch.relu), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(x))


@pytest.mark.parametrize("dim", [None, 0, (0, -1)])
def test_a_dim_that_varies_is_squeezed_at_no_size(dim: int | tuple[int, ...] | None, tmp_path: Path) -> None:
    """At batch 1 a shard gave its group a tensor of fewer dims than its files say."""

    def after(x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        return torch.relu(x.squeeze() if dim is None else x.squeeze(dim)).reshape(-1, 8)

    result = at_any_batch(Then(after), tmp_path)
    assert result.passed, result


def test_where_a_model_squeezes_what_its_shards_keep_verify_says_so(tmp_path: Path) -> None:
    result = at_any_batch(Then(torch.squeeze), tmp_path)
    assert not result.passed
    assert result.worst.endswith("with batch = 1, where it is float32 [1, 8] and the model's float32 [8]")


def at_any_batch(net: nn.Module, out: Path) -> VerifyResult:
    """Two layers cut, exported with a batch from 1 on."""
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=8)}}
    example = (torch.randn(3, 8),)
    plan = Plan({f"net.{pattern}": placement for pattern, placement in PAIR.items()})
    export(net, example, name="m", out=out, tensor_parallel=2, plan=plan, dynamic_shapes=dims)
    return verify(net, example, None, out, "m", atol=1e-5, rtol=1e-5, dynamic_shapes=dims)


class Summed(Pairs):
    """Terms that start from something whole: one reduction for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.ones_like(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            total = total + down(torch.relu(up(x)))
        return self.norm(total + x)


def test_a_whole_term_joins_a_pending_sum(tmp_path: Path) -> None:
    plan = {"ups.*": "Shard(0)", "downs.*.weight": "Shard(1)"}
    run(Summed(3), plan, {"all_reduce": 1}, tmp_path, torch.randn(2, 8))


class Residual(nn.Module):
    """What makes the stream is sharded; the layers that add to it take it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def test_a_stream_that_was_gathered_stays_whole(tmp_path: Path) -> None:
    run(Residual(), {"stem.*": "Shard(0)"}, {"all_gather": 1}, tmp_path, torch.randn(2, 4))


class Grouped(nn.Module):
    """Eight heads of queries on two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_more_ranks_than_heads_of_keys(tmp_path: Path) -> None:
    """Keys and values stay whole; each rank takes the head that its queries' heads share."""
    net, x = Grouped(), torch.randn(2, 5, 32)
    plan = {"q.*": "Shard(0)", "o.weight": "Shard(1)"}
    for size in (4, 8):
        report = export(net, (x,), name="m", out=tmp_path, tensor_parallel=size, plan=Plan(plan))
        assert dict(report.collectives()) == {"all_reduce": 1}
        assert not report.gathered
        assert verify(net, (x,), None, tmp_path, "m", atol=1e-5, rtol=1e-5).passed


def run(net: nn.Module, plan: dict[str, str], collectives: dict[str, int], out: Path, x: Tensor) -> None:
    report = export(net, (x,), name="m", out=out, tensor_parallel=2, plan=Plan(plan))
    assert dict(report.collectives()) == collectives
    result = verify(net, (x,), None, out, "m", atol=1e-5, rtol=1e-5)
    assert result.passed, result


SUMMED = {"net.up.*": "Shard(0)", "net.down.weight": "Shard(1)"}


@pytest.mark.parametrize(
    "after",
    [
        lambda y: torch.tanh(y / torch.zeros(8)),
        lambda y: torch.tanh(y / 0.0),
        lambda y: torch.tanh(y / (y.shape[0] - 4)),
        lambda y: torch.tanh(y / 1e-45),
        lambda y: torch.tanh(y * float("inf")),
    ],
    ids=["tensor", "number", "size", "tiny", "infinity"],
)
def test_what_makes_a_sum_infinite_comes_after_its_reduction(after: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Terms of different signs would be +inf and -inf, and their sum NaN."""
    torch.manual_seed(0)
    run(Then(after), SUMMED, {"all_reduce": 1}, tmp_path, torch.randn(4, 8))


def test_ordinary_numbers_scale_terms(tmp_path: Path) -> None:
    """One reduction for both sums, so that neither was reduced before it was scaled."""

    class Scaled(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (down(torch.relu(up(x))) for up, down in zip(self.ups, self.downs, strict=True))
            return first / 8 + second * -0.5 / x.shape[0]

    dims = {"x": {0: torch.export.Dim("batch", min=1, max=8)}}
    net, x = Scaled(2), torch.randn(2, 8)
    plan = Plan({"ups.*": "Shard(0)", "downs.*.weight": "Shard(1)"})
    report = export(net, (x,), name="m", out=tmp_path, tensor_parallel=2, plan=plan, dynamic_shapes=dims)
    assert dict(report.collectives()) == {"all_reduce": 1}
    assert verify(net, (x,), None, tmp_path, "m", atol=1e-5, rtol=1e-5, dynamic_shapes=dims).passed


class Integers(nn.Module):
    """A product of integers, cut along what is summed, and a function of it."""

    def __init__(self, dtype: torch.dtype, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", (torch.arange(32).reshape(8, 4) % 23 * 5).to(dtype))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x @ self.table)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y,
        lambda y: -y,
        lambda y: y / 2,
        lambda y: y * 0.5,
        lambda y: y.float(),
        lambda y: y.long(),
        lambda y: y.sum(-1),
        lambda y: y.type_as(torch.ones(1)),
    ],
    ids=["itself", "neg", "div", "mul", "float", "long", "sum", "type_as"],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_integers_wrap_before_they_are_converted(
    dtype: torch.dtype, after: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    limits = torch.iinfo(dtype)
    x = torch.linspace(limits.min * 0.99, limits.max * 0.99, 24, dtype=torch.float64).reshape(3, 8).to(dtype)
    run(Integers(dtype, after), {"table": "Shard(0)"}, {"all_reduce": 1}, tmp_path, x)


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(32).reshape(8, 4).to(torch.uint16))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table)


def test_what_ranks_cannot_add_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ranks can't form the sum of uint16 tensors"):
        run(Looked(), {"table": "Shard(0)"}, {}, tmp_path, torch.tensor([1, 2]))
