"""Buffers that a forward changes, and pipeline stages: which stage has one, and where a cut can't be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import export, verify
from shardserve.export.verification.running import Shards


class Late(nn.Module):
    """The first layer uses what the second writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x + self.memory)
        z = self.second(y)
        self.memory.copy_(z)
        return z


def test_a_buffer_that_an_earlier_stage_uses(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"uses the buffer 'memory' in pipeline stage 0 and changes it in stage 1"):
        export(Late(), (torch.ones(2, 4),), name="late", out=tmp_path, pipeline_parallel=2, cuts=("second",))
    with pytest.raises(
        ExportError, match=r"no modules to cut at \(the buffer 'memory' is used before it and changed after"
    ):
        export(Late(), (torch.ones(2, 4),), name="late", out=tmp_path, pipeline_parallel=2)
    export(Late(), (torch.ones(2, 4),), name="late", out=tmp_path, tensor_parallel=1)


def test_a_balanced_cut_is_where_no_buffer_is_in_the_way(tmp_path: Path) -> None:
    class Longer(Late):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(super().forward(x).relu())

    model = Longer()
    report = export(model, (torch.ones(2, 4),), name="longer", out=tmp_path, pipeline_parallel=2)
    assert report.cuts == ("third",)
    assert verify(model, (torch.ones(2, 4),), None, tmp_path, "longer").passed


class Early(nn.Module):
    """The second layer uses what the first has written, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        old = self.memory.clone()
        self.memory[0] = self.first(x)[0]
        return self.second(old + self.memory)


def test_a_buffer_crosses_to_later_stages(tmp_path: Path) -> None:
    model = Early()
    export(model, (torch.ones(2, 4),), name="early", out=tmp_path, pipeline_parallel=2, cuts=("second",))
    shards = Shards(tmp_path, "early")
    assert [[spec.name for spec in stage[0].config.state] for stage in shards.stages] == [["memory"], []]
    for factor in (1.0, 2.0, 3.0):
        x = torch.ones(2, 4) * factor
        with torch.no_grad():
            torch.testing.assert_close(shards.run({"x": x})[0], model(x))
