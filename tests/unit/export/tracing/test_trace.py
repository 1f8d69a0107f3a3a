from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError, InvalidInput
from shardserve.export import export, verify
from shardserve.export.symbols import Printer
from shardserve.export.verification.running import Shards


class Model(nn.Module):
    """A linear layer between what a test does before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))


def small(forward: Any) -> nn.Module:
    return type("Small", (Model,), {"forward": forward})()


X = torch.randn(6, 4)


def test_conditions_become_part_of_the_signature(tmp_path: Path) -> None:
    """A guard that the declared ranges don't imply is checked at each request and shown in the report."""

    def forward(self: Any, x: Tensor) -> Tensor:
        torch._check(x.shape[0] % 3 == 0)
        return self.linear(x)

    model = small(forward)
    report = export(model, (X,), name="m", out=tmp_path, dynamic_shapes=({0: Dim.AUTO},))
    assert report.signature.conditions == ("x_0 % 3 == 0",)
    assert "only where x_0 % 3 == 0" in str(report)
    shards = Shards(tmp_path, "m")
    with pytest.raises(InvalidInput, match="x_0 % 3 == 0, got x_0 = 7"):
        shards.run({"x": torch.randn(7, 4)})
    result = verify(model, (X,), None, tmp_path, "m")
    assert result.passed
    assert all(dims["x_0"] % 3 == 0 for dims in result.sizes)
    assert len(result.sizes) == 3


@pytest.mark.parametrize("given", ["twice", "a parameter"])
def test_one_tensor_as_several_inputs_of_the_example(tmp_path: Path, given: str) -> None:
    """torch.export takes values that are one object for one value: ids and mask that are both the same ones."""
    model = small(lambda self, a, b: self.linear(a) - 2 * b)
    tensor = model.linear.weight if given == "a parameter" else torch.ones(4, 4)
    export(model, (tensor,), kwargs={"b": tensor}, name="m", out=tmp_path)
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    (got,) = Shards(tmp_path, "m").run({"a": a, "b": b})
    with torch.no_grad():
        torch.testing.assert_close(got, model(a, b))


def test_dims_are_named_and_bounded_as_declared(tmp_path: Path) -> None:
    model = small(lambda self, x, *, mask: self.linear(x) * mask)
    half = Dim("half", max=9)
    report = export(
        model,
        (torch.randn(6, 4),),
        kwargs={"mask": torch.ones(6, 1)},
        name="m",
        out=tmp_path,
        dynamic_shapes={"x": {0: 2 * half}, "mask": {0: 2 * half}},
    )
    assert [spec.shape for spec in report.signature.inputs] == [("2*half", 4), ("2*half", 1)]
    assert report.signature.dims["half"].max == 9
    assert verify(model, (torch.randn(6, 4),), {"mask": torch.ones(6, 1)}, tmp_path, "m").passed


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.linear(x) if x.sum() > 0 else x, "torch.export can't trace the model"),
        (lambda self, x: self.linear(x.add_(1)), "the model changes 'x'"),
        (lambda self, x: self.linear(x) + torch.rand(4), "aten.rand"),
        (lambda self, x: F.dropout(self.linear(x), 0.5, True), "aten."),
        (lambda self, x: self.linear(x)[x[:, 0] > 0], "depends on the inputs' values|aten.nonzero|nonzero"),
        (lambda self, x: (self.linear(x), 3), "not a tensor"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, forward: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(small(forward), (X,), name="m", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_no_tensors_are_fixed(tmp_path: Path) -> None:
    model = small(lambda self, x, factor, name="a", other=None: self.linear(x) * factor)
    report = export(model, (X, 2.5, "b", None), name="m", out=tmp_path)
    assert report.fixed == {"factor": 2.5, "name": "b"}
    assert "input factor: fixed to 2.5, as it isn't a tensor" in str(report)
    assert verify(model, (X, 2.5, "b", None), None, tmp_path, "m").passed


def test_a_model_without_inputs(tmp_path: Path) -> None:
    model = small(lambda self: self.linear(torch.ones(2, 4)))
    export(model, (), name="m", out=tmp_path, tensor_parallel=2)
    assert verify(model, (), None, tmp_path, "m").passed


def test_the_model_keeps_its_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[0].eval()
    export(model, (X,), name="m", out=tmp_path)
    assert verify(model, (X,), None, tmp_path, "m").max_abs_error == 0
    assert [module.training for module in model.modules()] == [True, False, True]


def test_outputs_are_named_after_their_structure(tmp_path: Path) -> None:
    model = small(lambda self, x: {"a": self.linear(x), "b": (x, None, x + 1)})
    report = export(model, (X,), name="m", out=tmp_path)
    assert [spec.name for spec in report.signature.outputs] == ["a", "b_0", "b_2"]
    assert verify(model, (X,), None, tmp_path, "m").passed


class Keyless(dict[str, Tensor]):
    """As the outputs of diffusers: a container that torch knows, without a function for its keys."""


pytree.register_pytree_node(
    Keyless,
    lambda tree: (list(tree.values()), list(tree)),
    lambda values, names: Keyless(zip(names, values, strict=True)),
)


def test_outputs_in_containers_of_other_libraries(tmp_path: Path) -> None:
    model = small(lambda self, x: Keyless(sample=self.linear(x), more=({1: x},)))
    report = export(model, (X,), name="m", out=tmp_path)
    assert [spec.name for spec in report.signature.outputs] == ["sample", "more_0_1"]
    assert verify(model, (X,), None, tmp_path, "m").passed


def test_parametrized_weights(tmp_path: Path) -> None:
    """A weight that is made of others at each call, as the convolutions of speech models are."""
    model = small(lambda self, x: self.linear(x))
    nn.utils.parametrizations.weight_norm(model.linear)
    export(model, (X,), name="m", out=tmp_path)
    assert verify(model, (X,), None, tmp_path, "m").passed


class Recurrent(nn.Module):
    """A recurrent layer over sequences of any length, and its last states."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.layer = kind(4, 6, **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        outputs, states = self.layer(x)
        return outputs.relu(), states


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
        lambda: Recurrent(nn.LSTM, proj_size=3),
        lambda: Recurrent(nn.GRU, bidirectional=True),
        lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False),
    ],
)
def test_recurrent_layers_take_any_length(tmp_path: Path, layer: Any) -> None:
    model, x = layer(), torch.randn(3, 5, 4)
    dims = {0: Dim("a", min=2, max=7), 1: Dim("b", min=2, max=7)}
    report = export(model, (x,), name="m", out=tmp_path, dynamic_shapes=(dims,))
    assert report.signature.inputs[0].shape == ("a", "b", 4)
    assert not report.signature.conditions
    result = verify(model, (x,), None, tmp_path, "m")
    assert result.passed
    assert len(result.sizes) >= 5


def test_bfloat16(tmp_path: Path) -> None:
    model = small(lambda self, x: self.linear(x)).bfloat16()
    report = export(model, (X.bfloat16(),), name="m", out=tmp_path)
    assert report.signature.outputs[0].dtype == "bfloat16"
    assert verify(model, (X.bfloat16(),), None, tmp_path, "m").passed


def test_verify_fails_on_another_model(tmp_path: Path) -> None:
    model = small(lambda self, x: self.linear(x))
    export(model, (X,), name="m", out=tmp_path)
    model.linear.weight.data[0, 0] += 1
    result = verify(model, (X,), None, tmp_path, "m")
    assert not result.passed
    assert result.max_abs_error > 0.5
    assert "output 'output'" in result.worst


def test_printing() -> None:
    b, t, unknown = sympy.symbols("s0 s1 u0", positive=True, integer=True)
    printer = Printer({b: "batch", t: "length"})
    assert printer.expression(b * t + 2 * b - 1) == "2*batch + batch*length - 1"
    assert printer.expression(sympy.Max(b, t - 4)) in ("max(batch, length - 4)", "max(length - 4, batch)")
    assert printer.expression(-b) == "-batch"
    assert printer.condition(sympy.Eq(b, t)) == "batch == length"
    with pytest.raises(ExportError, match="u0 depends on the inputs' values"):
        printer.expression(b + unknown)
    with pytest.raises(ExportError, match="can't express"):
        printer.expression(sympy.log(b))
