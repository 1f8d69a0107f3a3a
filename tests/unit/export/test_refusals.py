"""Models that can't be exported: each refusal says what torch said, where, and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.nn.parameter import is_lazy

from shardserve.errors import ExportError
from shardserve.export import export, refusals

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
        (lambda y: y if y.sum() > 0 else -y, "data-dependent", "torch.where"),
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


def test_operators_that_take_functions(tmp_path: Path) -> None:
    """The graph has a graph of its own for each function."""
    identity, negative = lambda y: y.clone(), lambda y: -y

    def chosen(y: Tensor) -> Any:
        return torch.cond(y.sum() > 0, identity, negative, (y,))

    def repeated(y: Tensor) -> Any:
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y + 1), (torch.tensor(0), y))

    for after, op, advice in ((chosen, "cond", "torch.where"), (repeated, "while_loop", "Python loop")):
        message = refusal(nn.Sequential(Model(after)), tmp_path)
        assert message.startswith(f"operator {op} in module '0' ")
        assert advice in message


def test_the_place_in_the_model(tmp_path: Path) -> None:
    message = refusal(Model(lambda y: y if y.sum() > 0 else -y), tmp_path)
    assert "test_refusals.py:" in message


def test_a_dim_that_the_model_fixes(tmp_path: Path) -> None:
    model = Model(lambda y: y.reshape(6, 2, 2))
    message = refusal(model, tmp_path, dynamic_shapes=({0: Dim("batch", max=9)},))
    assert "batch" in message
    assert "take that dim out of dynamic_shapes" in message


class Counting(nn.Module):
    """Counts its eager runs, in a buffer too, and can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))
        self.register_buffer("count", torch.zeros(()))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            self.runs += 1
        self.count.add_(1)
        return x if (x + self.weight).sum() > 0 else -x


def test_the_model_is_afterwards_as_before(tmp_path: Path) -> None:
    model = Counting()
    assert "torch.where" in refusal(model, tmp_path)
    assert (model.runs, model.count.item()) == (1, 0)


def test_lazy_parameters_stay_so(tmp_path: Path) -> None:
    model = nn.LazyLinear(4)
    assert "run the model once on the example inputs before" in refusal(model, tmp_path)
    assert is_lazy(model.weight)


def test_a_large_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_LARGEST_RUN", 99)
    model = Counting()
    assert "torch.where" in refusal(model, tmp_path)
    assert model.runs == 0


def test_a_model_that_raises_anyway(tmp_path: Path) -> None:
    """Nothing about torch.export: the example inputs or the model are wrong."""
    message = refusal(Model(lambda y: y), tmp_path, (torch.randn(6, 5),))
    assert message.startswith("the model raises on the example inputs: RuntimeError")
    assert "torch.export" not in message
