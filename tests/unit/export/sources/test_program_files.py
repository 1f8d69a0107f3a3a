from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import Plan, Report, export, verify
from shardserve.export.sources.program import load_program


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.register_buffer("offset", torch.randn(8), persistent=False)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x) + self.offset
        return {"z": x * y}


def test_exports_with_plan_and_cuts_by_the_model_s_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = {0: torch.export.Dim("batch", min=1, max=16)}
    model, args, kwargs = Model().eval(), (torch.randn(2, 8),), {"y": torch.randn(2, 8)}
    program = torch.export.export(model, args, kwargs, dynamic_shapes={"x": rows, "y": rows})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded, module, args, kwargs = load_program(tmp_path / "model.pt2")
    plan = Plan({"blocks.*.0.*": "Shard(0)", "blocks.*.2.weight": "Shard(1)"}, ("blocks.1",))
    options = {"name": "m", "out": tmp_path / "out", "tensor_parallel": 2, "pipeline_parallel": 2, "plan": plan}
    report = export(module, args, kwargs=kwargs, program=loaded, **options)  # type: ignore[arg-type]
    assert [spec.name for spec in report.signature.inputs] == ["x", "y"]
    assert [spec.name for spec in report.signature.outputs] == ["z"]
    assert report.collectives() == {"all_reduce": 2}
    assert len(report.signature.dims) == 1
    for whole in (module, model):
        result = verify(whole, args, kwargs, tmp_path / "out", "m")
        assert result.passed
        assert len(result.sizes) > 1


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "other.zip").rename(tmp_path / "other.pt2")
    for name, message in (("text", "not a file of torch.export"), ("other", "can't read it"), ("none", "no such file")):
        with pytest.raises(ExportError, match=rf"{name}\.pt2: .*{message}"):
            load_program(tmp_path / f"{name}.pt2")


class Pairs(nn.Module):
    """x has a row more than y."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x[:-1] + y)


def saved(path: Path, *args: Any, **kwargs: Any) -> Path:
    torch.export.save(torch.export.export(*args, **kwargs), path)
    return path


def reported(path: Path, out: Path) -> Report:
    """Of a program's export, which verifies."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program, module, args, kwargs = load_program(path)
        report = export(module, args, kwargs=kwargs, program=program, name="m", out=out)
    assert verify(module, args, kwargs, out, "m").passed
    return report


def test_the_dims_are_those_that_it_was_exported_with(tmp_path: Path) -> None:
    rows = {0: torch.export.Dim("batch", min=1, max=8)}
    path = saved(tmp_path / "a.pt2", nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_shapes={"input": rows})
    signature = reported(path, tmp_path / "out").signature
    assert str(signature.dims["input_0"]) == "1 to 8"
    assert signature.conditions == ()
    assert signature.bind({"input": (1, 4)}, {"input": "float32"}) == {"input_0": 1}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_dim_that_depends_on_another(tmp_path: Path, loaded: bool) -> None:
    n = torch.export.Dim("n", min=3, max=9)
    args, dims = (torch.randn(5, 4), torch.randn(4, 4)), {"x": {0: n}, "y": {0: n - 1}}
    if loaded:
        report = reported(saved(tmp_path / "a.pt2", Pairs(), args, dynamic_shapes=dims), tmp_path / "out")
    else:
        report = export(Pairs(), args, dynamic_shapes=dims, name="m", out=tmp_path / "out")
    assert [spec.shape for spec in report.signature.inputs] == [("y_0 + 1", 4), ("y_0", 4)]
    assert str(report.signature.dims["y_0"]) == "2 to 8"


def test_a_condition_that_it_was_exported_with(tmp_path: Path) -> None:
    class Even(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (1 if input.shape[0] % 2 == 0 else -1)

    rows = {0: torch.export.Dim.AUTO}
    path = saved(tmp_path / "a.pt2", Even(4, 4), (torch.randn(4, 4),), dynamic_shapes={"input": rows})
    assert reported(path, tmp_path / "out").signature.conditions == ("input_0 % 2 == 0",)


@pytest.mark.parametrize(("layer", "op"), [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(4), "batch_norm")])
def test_a_program_in_training_mode(tmp_path: Path, layer: nn.Module, op: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer).train()
    program, module, args, _ = load_program(saved(tmp_path / "a.pt2", model, (torch.randn(2, 4),)))
    with pytest.raises(ExportError, match=rf"training mode \(aten.{op}.* in module '1'\).*model.eval\(\)"):
        export(module, args, program=program, name="m", out=tmp_path / "out")


def test_files_of_other_functions_of_torch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "state.pt2")
    torch.jit.save(torch.jit.script(nn.Linear(4, 4)), tmp_path / "script.pt2")
    for name in ("state", "script"):
        with pytest.raises(ExportError, match=rf"{name}\.pt2: .*of torch.save or torch.jit.save"):
            load_program(tmp_path / f"{name}.pt2")
    assert capfd.readouterr().err == ""
