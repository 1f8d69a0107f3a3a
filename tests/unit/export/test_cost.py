"""FLOPs, bytes and the cost model: against torch's own counter, and by hand."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from models.zoo import CASES
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shardserve.errors import ExportError
from shardserve.export import cost
from shardserve.export.sharding import cut
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.sharding.propagate import LocalGraph, propagate
from shardserve.export.tracing.trace import Trace, trace


def traced_case(name: str) -> tuple[Trace, nn.Module, tuple, dict]:
    torch.manual_seed(0)
    case = CASES[name]()
    return (
        trace(case.model, case.args, case.kwargs, case.dynamic_shapes, None, None),
        case.model,
        case.args,
        case.kwargs,
    )


def whole_flops(traced: Trace) -> cost.Dim:
    return sum(cost.node_flops(node) for node in traced.graph.nodes if node.op == "call_function")


def graph_flops(graph: LocalGraph) -> cost.Dim:
    tensors = graph.meanings()
    return sum(cost.operation(node, tensors).flops for node in graph.nodes)


@pytest.mark.parametrize("name", ["rotary", "fused_by_hand", "convolutional", "tied", "einsum", "recommender", "odds"])
def test_flops_are_torchs_own(name: str) -> None:
    traced, model, args, kwargs = traced_case(name)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(*args, **kwargs)
    assert cost.Sizes.example(traced)(whole_flops(traced)) == counter.get_total_flops()


class Odd(nn.Module):
    """Operators that nothing in the zoo has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.bilinear = nn.Bilinear(5, 6, 7)
        self.lstm = nn.LSTM(7, 8, num_layers=2, bidirectional=True)
        self.cell = nn.GRUCell(7, 9)

    def forward(self, image: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = self.bilinear(x, y)
        e = torch.einsum("...ij,...jk,kl->...il", both[None], both.mT[None], both)
        return self.up(image), self.lstm(both[None])[0], self.cell(both), torch.dot(x[0], x[1]), x @ x[0], e


def test_flops_by_hand() -> None:
    args = (torch.randn(2, 4, 5, 5), torch.randn(7, 5), torch.randn(7, 6))
    traced = trace(Odd(), args, {}, None, None, None)
    up = 2 * (2 * 4 * 5 * 5) * (3 * 3 * 3)
    bilinear = 2 * 7 * 7 * 5 * 6
    lstm = 2 * 7 * 2 * 4 * 8 * (7 + 8 + 16 + 8)
    cell = 2 * 7 * 3 * 9 * (7 + 9)
    assert whole_flops(traced) == up + bilinear + lstm + cell + 2 * 5 + 2 * 7 * 5 + 2 * (2 * 7 * 7 * 7)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def pair(size: int, cuts: tuple[str, ...] = ()) -> tuple[Trace, list[LocalGraph]]:
    shapes = ({0: Dim("batch", min=1, max=64)},)
    traced = trace(Two(), (torch.randn(3, 16),), {}, shapes, None, None)
    placements: dict[str, Replicate | Shard] = {name: Replicate() for name in traced.tensors}
    placements.update({"a.weight": Shard(0), "a.bias": Shard(0), "b.weight": Shard(1)} if size > 1 else {})
    stages = cut.assign(traced, cuts)
    return traced, [propagate(traced, placements, stages, size, rank) for rank in range(size)]


def test_flops_are_expressions_over_the_dims() -> None:
    traced, graphs = pair(2)
    (batch,) = traced.printer.names
    assert whole_flops(traced) == 2 * 2 * 16 * 32 * batch
    assert [graph_flops(graph) for graph in graphs] == [2 * 16 * 32 * batch] * 2
    assert isinstance(graph_flops(graphs[0]), sympy.Expr)
    assert cost.Sizes.example(traced)(batch) == 3
    assert cost.Sizes.largest(traced)(batch * 2) == 128
    assert cost.Sizes.at(traced, {"batch": 5})(batch) == 5
    with pytest.raises(ExportError, match="no dim is named 'length'; there are batch"):
        cost.Sizes.at(traced, {"length": 5})


def test_a_rank_s_cost() -> None:
    traced, graphs = pair(2)
    (batch,) = traced.printer.names
    (stage,) = cut.split(graphs[0], 1)
    rank = cost.rank_cost(stage, graphs[0].meanings(), traced.tensors)
    assert rank.parameter_bytes == 4 * (16 * 16 + 16 + 16 * 16 + 16)
    assert rank.collectives == (("all_reduce", 4 * 16 * batch),)
    first = next(operation for operation in rank.operations if operation.op == "aten.linear.default")
    assert first.bytes == 4 * (16 * batch + 16 * 16 + 16 + 16 * batch)
    at_most = cost.activation_bytes(stage, graphs[0].meanings(), cost.Sizes.example(traced))
    # the input, and two results of which one is made of the other
    assert at_most == 4 * 3 * (16 + 16 + 16)


def test_the_model_of_latency() -> None:
    hardware = cost.Hardware(1e9, 1e9, 1e-6, 1e-5, 1e9, 1e-4, 1e9)
    traced, graphs = pair(1, ("b",))
    sizes = cost.Sizes.example(traced)
    costs = [[cost.rank_cost(stage, graphs[0].meanings(), traced.tensors)] for stage in cut.split(graphs[0], 2)]
    linear = 1e-6 + 4 * (3 * 16 + 3 * 32 + 16 * 32 + 32) / 1e9
    relu = 1e-6 + 4 * 3 * 64 / 1e9
    other = 1e-6 + 4 * (3 * 16 + 3 * 32 + 16 * 32 + 16) / 1e9
    link = 1e-4 + 4 * 3 * 32 / 1e9
    # A linear layer of 3 rows makes more FLOPs than it moves bytes at these rates.
    product = 1e-6 + 2 * 3 * 16 * 32 / 1e9
    assert cost.latency(costs, 1, sizes, hardware) == pytest.approx(
        max(linear, product) + relu + max(other, product) + link
    )
    assert cost.interval(costs, 1, sizes, hardware) == pytest.approx(max(linear, product) + relu)
    assert hardware.collective_time("all_reduce", 1e6, 4) == pytest.approx(3e-5 + 1.5e-3)
    assert hardware.collective_time("all_gather", 1e6, 4) == pytest.approx(3e-5 + 3e-3)
    assert hardware.collective_time("all_reduce", 1e6, 1) == 0


def test_tied_weights_count_once_in_a_stage() -> None:
    traced, *_ = traced_case("tied")
    placements: dict[str, Replicate | Shard] = {name: Replicate() for name in traced.tensors}
    whole = propagate(traced, placements, cut.assign(traced, ()), 1, 0)
    layers, table = 4 * 2 * (16 * 16 + 16), 4 * 40 * 16
    assert cost.parameter_bytes(whole.parameters, traced.tensors) == layers + table
    apart = propagate(traced, placements, cut.assign(traced, ("layers.1",)), 1, 0)
    stages = [cost.parameter_bytes(stage.parameters, traced.tensors) for stage in cut.split(apart, 2)]
    assert stages == [layers // 2 + table] * 2
