"""Exports that several end-to-end tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import EXAMPLES, Up, export_transformer


class Transformer:
    """The exported example of 2 x 2 ranks, and the unsharded model."""

    def __init__(self, folder: Path) -> None:
        self.model_dir = folder / "model"
        self.model: torch.nn.Module = export_transformer(self.model_dir, 2, 2)

    def up(self, **environment: str) -> Up:
        return Up(EXAMPLES / "transformer", self.model_dir, "transformer", **environment)


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer(tmp_path_factory.mktemp("transformer"))
