"""Exports that several end-to-end tests serve."""

from __future__ import annotations

import pytest
from serving import Transformer


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer(tmp_path_factory.mktemp("transformer"))
