"""Models for `benchmarks.export_memory`, as `shardserve export` takes them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

WIDTH = 4096


def live() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Linear layers of LIVE_BYTES bytes in all."""
    layers = int(os.environ["LIVE_BYTES"]) // (4 * WIDTH * WIDTH)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    plan = {"parameters": {f"{index}.weight": f"Shard({index % 2})" for index in range(layers)}}
    return model, (torch.ones(1, WIDTH),), {"plan": plan}
