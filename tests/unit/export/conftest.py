"""Transformers exported once in each layout, for all tests of this folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from shardserve.export import Plan, Report, export  # noqa: E402 -- after the path of `models`

PLAN = Plan.load(ROOT / "examples" / "transformer" / "plan.json")
LAYOUTS = [(2, 1), (1, 2), (2, 2), (8, 2)]


def alter_weight(out: Path, rank: int, name: str = "") -> str:
    """Make a weight of a rank's shard larger, and its checksum right again; which one it was."""
    folder = out / f"device{rank}"
    tensors = load_file(folder / "weights.safetensors")
    name = next(key for key in tensors if name in key)
    tensors[name] = tensors[name] * 1.5 + 0.1
    save_file(tensors, folder / "weights.safetensors")
    config = json.loads((folder / "group_config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "group_config.json").write_text(json.dumps(config))
    return name


def example_module(path: str) -> ModuleType:
    """A file of the examples as a module."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Exported:
    """A model and its shards."""

    model: nn.Module
    args: tuple[Tensor, ...]
    report: Report
    out: Path
    name: str = "transformer"


def transformer(blocks: int = 2) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    """The example's transformer, smaller, with its options."""
    net = example_module("transformer/net.py")
    _, args, options = net.example()
    return net.Transformer(blocks=blocks, seed=3).eval(), args, options


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Exported]:
    """The transformer exported for (tensor_parallel, pipeline_parallel)."""
    made: dict[tuple[int, int], Exported] = {}

    def get(tensor_parallel: int, pipeline_parallel: int) -> Exported:
        key = (tensor_parallel, pipeline_parallel)
        if key not in made:
            torch.manual_seed(0)
            model, args, options = transformer()
            out = tmp_path_factory.mktemp(f"tp{key[0]}pp{key[1]}")
            report = export(
                model,
                args,
                name="transformer",
                out=out,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                plan=PLAN,
                **options,
            )
            made[key] = Exported(model, args, report, out)
        return made[key]

    return get
