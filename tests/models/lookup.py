"""Layers between two collectives, and a lookup that may raise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from shardserve.export import Plan, export

RANKS = 2
GRAPH = "block.graph.json"


class LookupLayers(nn.Module):
    """What a test makes of them is its own forward, of x float32 [rows, 8] and ids int64 [rows]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8)


def export_lookup(kind: type[LookupLayers], out: Path) -> list[Path]:
    """The graph files of such a module, exported for `RANKS` tensor-parallel ranks."""
    torch.manual_seed(0)
    shapes = ({0: Dim("rows", min=1, max=64)},) * 2
    plan = Plan.from_dict(
        {"parameters": {"layers.1.*": "Shard(0)", "layers.3.weight": "Shard(1)", "head.*": "Shard(0)"}}
    )
    args = torch.randn(2, 8), torch.tensor([1, 2])
    export(kind(), args, name="block", out=out, dynamic_shapes=shapes, plan=plan, tensor_parallel=RANKS)
    return [out / f"device{rank}" / GRAPH for rank in range(RANKS)]
