from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from shardserve.cli.quiet import quiet_torch


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("from the model", file=sys.stderr)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("level", ["WARNING", "INFO"])
def test_what_torch_tells_of_a_model_that_it_cannot_trace(
    level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDSERVE_LOG_LEVEL", level)
    stream = sys.stderr
    with pytest.raises(Exception, match="data-dependent"), quiet_torch():
        torch.export.export(Branch(), (torch.ones(2),))
    assert sys.stderr is stream
    told = capsys.readouterr().err
    assert ("def forward(self, " in told) == (level == "INFO")
    assert told.startswith("from the model\n")
    logged = [record for record in caplog.records if record.levelname == "WARNING"]
    assert bool(logged) == (level == "INFO")
    if level == "WARNING":
        assert not told.replace("from the model\n", "")
