"""Models that can't be exported: each refusal says what torch said, where, and what to try."""

from __future__ import annotations

import re
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


B = Dim("batch", min=1, max=9)


@pytest.mark.parametrize(
    ("dynamic_shapes", "message"),
    [
        ({"x": {0: Dim("rows", min=7, max=9)}}, r"input 'x' has size 6 at axis 0, which is outside dim 'rows', 7 to 9"),
        ({"x": {0: Dim("rows", max=5)}}, r"size 6 at axis 0, which is outside dim 'rows', 1 to 5"),
        ({"x": {2: B}}, r"input 'x' has no axis 2: the example's has the shape \[6, 4\]"),
        ({"z": {0: B}}, r"\['x'\][^\n]*\['z'\](?s:.*)a dict with forward's parameters for keys"),
        (({0: B}, {0: B}), r"What to try: dynamic_shapes has the form of the inputs"),
    ],
)
def test_dims_that_the_example_does_not_fit(tmp_path: Path, dynamic_shapes: Any, message: str) -> None:
    said = refusal(Model(lambda y: y), tmp_path, dynamic_shapes=dynamic_shapes)
    assert re.search(message, said)
    assert "For more information" not in said


def test_dims_in_containers_are_named_by_their_path(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, batch: Any) -> Tensor:
            return batch["x"][1] + 1

    message = refusal(Nested(), tmp_path, ({"x": [X, X]},), dynamic_shapes={"batch": {"x": [None, {5: B}]}})
    assert "input 'batch['x'][1]' has no axis 5" in message


@pytest.mark.parametrize("size", [0, 1])
def test_an_example_whose_size_torch_takes_for_a_constant(tmp_path: Path, size: int) -> None:
    message = refusal(Model(lambda y: y), tmp_path, (X[:size],), dynamic_shapes=({0: Dim("rows", max=9, min=0)},))
    assert "use an example of size 2 or more: torch.export takes sizes 0 and 1 for constants" in message


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules(tmp_path: Path) -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    assert "export the nn.Module that it was scripted from" in refusal(scripted, tmp_path)
    assert refusal(nn.Sequential(scripted, Model(lambda y: y.numpy())), tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    message = refusal("model", tmp_path)  # type: ignore[arg-type]
    assert message == "the model must be a torch.nn.Module, got str"


def test_sparse_tensors(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("table", torch.eye(4).to_sparse())
    assert refusal(model, tmp_path).startswith("'table' is a tensor of layout sparse_coo; shards hold dense ones only")


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    assert "output 'output_1' is 3, not a tensor" in refusal(Model(lambda y: (y, 3)), tmp_path)
    rows = ({0: B},)
    message = refusal(Model(lambda y: {"y": y, "rows": y.shape[0]}), tmp_path, dynamic_shapes=rows)
    assert "output 'rows' is a number that it computes from sizes or inputs, not a tensor" in message


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
