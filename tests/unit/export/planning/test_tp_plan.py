"""Hugging Face's tp_plan as a plan of ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify
from shardserve.export.planning.tp_plan import STYLES


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.packed = nn.Linear(8, 32, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.packed(x).chunk(2, -1)
        return self.down(torch.relu(self.up(x)) + first * second) + torch.relu(first) @ self.experts[1].mT


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


BASE = {
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
    "layers.*.packed": "packed_colwise",
    "layers.*": "moe_tp_experts",
    "layers.*.experts": "rowwise",
}


class Whole(nn.Module):
    """As a PreTrainedModel with a head is."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.model = Base()
        self.head = nn.Linear(8, 20, bias=False)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids))


def today() -> Whole:
    plan = {"head": "colwise_gather_output", "model.embedding": "embedding_rowwise"}
    return Whole(tp_plan={**plan, **{f"model.{pattern}": style for pattern, style in BASE.items()}})


def before() -> Whole:
    plan = {"head": "colwise_rep", "model.embedding": "embedding_rowwise"}
    return Whole(_tp_plan=plan, config=SimpleNamespace(base_model_tp_plan=BASE), base_model_prefix="model")


@pytest.mark.parametrize("make", [today, before])
def test_styles_become_placements(make: type[Whole]) -> None:
    layer = {
        "up.weight": "Shard(0)",
        "up.bias": "Shard(0)",
        "down.weight": "Shard(1)",
        "packed.weight": "Shard(0, blocks=2)",
        "experts": "Shard(2)",
    }
    expected = {f"model.layers.{index}.{name}": shard for index in range(2) for name, shard in layer.items()}
    expected |= {"head.weight": "Shard(0)", "model.embedding.weight": "Shard(0)"}
    assert Plan.from_tp_plan(make()).parameters == expected


def test_an_export_by_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = today().eval(), torch.randint(0, 20, (2, 5))
    report = export(model, (ids,), name="m", out=tmp_path, tensor_parallel=2, plan=Plan.from_tp_plan(model))
    assert report.collectives()["all_reduce"] <= 1 + 2 * 2
    assert verify(model, (ids,), None, tmp_path, "m").passed


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "Whole has no tp_plan"),
        (
            {"tp_plan": {"model.layers.*.up": "diagonal"}},
            r"tp_plan: 'model.layers.\*.up' has the style 'diagonal'; known",
        ),
        ({"tp_plan": {"nowhere": "colwise"}}, "the tp_plan of Whole cuts none of its parameters"),
        ({"tp_plan": {"model": "all_reduce"}}, "cuts none"),
    ],
)
def test_what_is_wrong_is_said(attributes: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Plan.from_tp_plan(Whole(**attributes))


def test_every_style_of_transformers_is_known() -> None:
    styles = pytest.importorskip("transformers.distributed.tensor_parallel").ALL_PARALLEL_STYLES
    pytest.importorskip("transformers.distributed.expert_parallel")
    assert set(styles.keys()) <= set(STYLES)
