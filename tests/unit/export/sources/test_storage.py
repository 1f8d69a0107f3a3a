from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import export, load_checkpoint, verify, without_storage
from shardserve.export.sources import fill, hollow


class Model(nn.Module):
    """Tied weights, a persistent and a computed buffer, a constant, a module that keeps its parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        rates = [rate.item() for rate in torch.linspace(0.5, 1, 8)]
        self.register_buffer("table", torch.tensor(rates), persistent=False)
        self.scale = torch.tensor(rates[0])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lstm(self.embed(ids))[0] * self.table + self.scale
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


IDS = (torch.arange(10).reshape(2, 5),)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    nn.init.normal_(made.norm.running_mean)
    return made


def saved(model: nn.Module, path: Path, *without: str, **more: Tensor) -> Path:
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in without}
    save_file({**state, **more}, path)
    return path


def lean() -> Model:
    with without_storage():
        return Model().eval()


def test_parameters_have_no_storage_and_all_else_is_computed(model: Model) -> None:
    empty = lean()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.head.weight is empty.embed.weight
    assert torch.equal(empty.table, model.table)
    assert torch.equal(empty.scale, model.scale)
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_meta_device_is_ignored(model: Model) -> None:
    with without_storage(), torch.device("meta"):
        empty = Model()
    assert empty.embed.weight.is_meta
    assert torch.equal(empty.table, model.table)
    with torch.device("meta"):
        assert Model.__new__(Model) is not None
        assert torch.ones(1).is_meta


def test_a_module_that_ties_one_tensor_twice() -> None:
    with without_storage():
        shared = nn.Parameter(torch.ones(2))
        one, two = nn.Module(), nn.Module()
        one.weight, two.weight = shared, shared
    assert one.weight is two.weight
    assert one.weight.is_meta


def test_exports_from_a_file_as_from_the_live_module(model: Model, tmp_path: Path) -> None:
    file = saved(model, tmp_path / "w.safetensors", "head.weight")
    empty = lean()
    report = export(empty, IDS, name="m", out=tmp_path / "out", weights=file)
    assert not report.warnings
    result = verify(model, IDS, None, tmp_path / "out", "m")
    assert result.passed
    assert result.max_abs_error < 1e-5
    # The module has the values, too, and no memory of its own for them.
    assert torch.equal(empty.lstm.weight_hh_l0, model.lstm.weight_hh_l0)
    assert "w.safetensors" in Path("/proc/self/maps").read_text()


def test_a_state_dict_and_a_live_module(model: Model, tmp_path: Path) -> None:
    other = Model().eval()
    export(other, IDS, name="m", out=tmp_path, weights=model.state_dict())
    assert verify(model, IDS, None, tmp_path, "m").passed


def test_tensors_that_the_model_has_no_place_for(model: Model, tmp_path: Path) -> None:
    file = saved(model, tmp_path / "w.safetensors", **{f"extra{index}": torch.ones(1) for index in range(7)})
    report = export(lean(), IDS, name="m", out=tmp_path / "out", weights=file)
    assert report.warnings == (
        "weights: the model has no place for 7 tensors: 'extra0', 'extra1', 'extra2', 'extra3', 'extra4' and 2 more",
    )


@pytest.mark.parametrize("name", ["lstm.bias_ih_l0", "norm.running_mean"])
def test_a_value_without_a_source(model: Model, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(model, tmp_path / "w.safetensors", name)
    with pytest.raises(ExportError, match=f"^'{name}' has no value: in no weights file"):
        export(lean(), IDS, name="m", out=tmp_path / "out", weights=file)
    assert not (tmp_path / "out").exists()
    # Of a parameter that is told before the tracing.
    warned = [record.getMessage() for record in caplog.records if record.name == "shardserve.export.api"]
    assert warned == [f"weights: there is no value of '{name}': an error if the model uses it"] * ("lstm" in name)


def test_a_value_that_the_graph_does_not_use(model: Model, tmp_path: Path) -> None:
    file = saved(model, tmp_path / "w.safetensors", "norm.num_batches_tracked")
    export(lean(), IDS, name="m", out=tmp_path / "out", weights=file)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^'lstm.weight_ih_l0', .* and 2 more have no values"):
        export(lean(), IDS, name="m", out=tmp_path)


def test_a_constant_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model.__new__(Model)
        nn.Module.__init__(model)
        model.scale = torch.ones(1)
    with pytest.raises(ExportError, match="constant 'scale' is on the meta device"):
        fill(model, None)


@pytest.mark.parametrize(
    ("value", "kind"), [(torch.ones(8, 10), r"float32 \[8, 10\]"), (torch.ones(10, 8).half(), r"float16 \[10, 8\]")]
)
def test_another_shape_or_dtype(model: Model, tmp_path: Path, value: Tensor, kind: str) -> None:
    file = saved(model, tmp_path / "w.safetensors", "head.weight", "embed.weight", **{"embed.weight": value})
    message = rf"{re.escape(str(file))}: tensor 'embed.weight' is {kind}, the model's is float32 \[10, 8\]"
    with pytest.raises(ExportError, match=message):
        export(lean(), IDS, name="m", out=tmp_path / "out", weights=file)


def test_tied_weights_that_differ(model: Model, tmp_path: Path) -> None:
    file = saved(model, tmp_path / "w.safetensors", "head.weight", **{"head.weight": torch.ones(10, 8)})
    with pytest.raises(ExportError, match=r"'embed.weight', 'head.weight' are one tied weight"):
        fill(lean(), load_checkpoint(file))


def test_hollow_tensors_take_no_memory() -> None:
    def anonymous() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(re.search(r"Anonymous:\s+(\d+)", text)[1])  # type: ignore[index]

    before = anonymous()
    tensor = hollow(torch.empty(1 << 28, device="meta"))
    assert tensor.shape == (1 << 28,)
    assert float(tensor[-1]) == 0.0
    tensor[0] = 1.0
    assert anonymous() - before < 1 << 14
