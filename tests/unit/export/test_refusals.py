"""Models that can't be exported: each refusal says what torch said, where, and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ExportError
from shardserve.export import export

X = torch.randn(6, 4)


@dataclass
class Result:
    y: Tensor


class Model(nn.Module):
    """A linear layer before what a test does."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.linear(x))


def refusal(model: nn.Module, tmp_path: Path, args: tuple[Any, ...] = (X,), **options: Any) -> str:
    with pytest.raises(ExportError) as raised:
        export(model, args, name="m", out=tmp_path, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("after", "said", "advice"),
    [
        (lambda y: y if y.sum() > 0 else -y, "data-dependent", "torch.cond"),
        (lambda y: y.new_zeros(int(y[0, 0].item())), "data-dependent", "no .item()"),
        (lambda y: y + torch.from_numpy(y.numpy()), "numpy", "Python stage"),
        (lambda y: Result(y), "Result", "register_dataclass"),
        (lambda y: y * y.max().item(), "aten.item", "keep it a tensor"),
        (lambda y: torch.unique(y), "aten._unique2", "keep the size fixed"),
        (lambda y: y + torch.rand(4), "aten.rand", "as an input of the model"),
    ],
)
def test_what_to_try(tmp_path: Path, after: Any, said: str, advice: str) -> None:
    message = refusal(Model(after), tmp_path)
    assert said in message
    assert advice in message
    assert "TORCH_LOGS" not in message


def test_the_place_in_the_model(tmp_path: Path) -> None:
    message = refusal(Model(lambda y: y if y.sum() > 0 else -y), tmp_path)
    assert "test_refusals.py:" in message


def test_a_dim_that_the_model_fixes(tmp_path: Path) -> None:
    model = Model(lambda y: y.reshape(6, 2, 2))
    message = refusal(model, tmp_path, dynamic_shapes=({0: Dim("batch", max=9)},))
    assert "batch" in message
    assert "take that dim out of dynamic_shapes" in message


def test_a_model_that_raises_anyway(tmp_path: Path) -> None:
    """Nothing about torch.export: the example inputs or the model are wrong."""
    message = refusal(Model(lambda y: y), tmp_path, (torch.randn(6, 5),))
    assert message.startswith("the model raises on the example inputs: RuntimeError")
    assert "torch.export" not in message
