from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify
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
    torch.save({"a": 1}, tmp_path / "saved.pt2")
    for name, message in (("text", "not a file of torch.export"), ("saved", "can't read it"), ("none", "no such file")):
        with pytest.raises(ExportError, match=rf"{name}\.pt2: .*{message}"):
            load_program(tmp_path / f"{name}.pt2")
