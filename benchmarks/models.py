"""The models that the benchmarks serve, exported as a user would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.servers import ROOT, write_servable
from shardserve.export import Plan, export

MATMUL = ROOT / "examples" / "matmul_distributed" / "export_model"
BLOCKS_PLAN = {
    "blocks.*.query.*": "Shard(0)",
    "blocks.*.key.*": "Shard(0)",
    "blocks.*.value.*": "Shard(0)",
    "blocks.*.out.weight": "Shard(1)",
    "blocks.*.up.*": "Shard(0)",
    "blocks.*.down.weight": "Shard(1)",
}


def matmul(folder: Path, ranks: int, seed: int | None = None) -> nn.Module:
    """The reference example on so many ranks: x float32 [128, 96] → y float32 [128, 16]."""
    net = _net(seed)
    plan = Plan({"w": "Shard(0)"} if ranks > 1 else {})
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    x = torch.ones(128, 96)
    export(net, (x,), name="matmul", out=folder / "model", tensor_parallel=ranks, plan=plan, **names)
    write_servable(folder, "matmul", "x", "y", rank_size=ranks, stage_size=1, with_batch_dim=False)
    return net


def matmul_of_batches(folder: Path, largest: int) -> None:
    """The same product on one rank, of instances: x float32 [batch, 128, 96] → y float32 [batch, 128, 16]."""
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=largest)}}
    export(_net(None), (torch.ones(3, 128, 96),), name="matmul", out=folder / "model", dynamic_shapes=dims, **names)
    write_servable(folder, "matmul", "x", "y", rank_size=1, stage_size=1)


def _net(seed: int | None) -> nn.Module:
    sys.path.insert(0, str(MATMUL))
    from net import Net

    net: nn.Module = Net(seed)
    return net.eval()


class Block(nn.Module):
    """Attention over x float32 [batch, length, width] with a mask, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        query, key, value = (
            part(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """ids int64 [batch, length] and mask bool [batch, length] (False: padding) → y float32 [batch, length, width]."""

    def __init__(self, blocks: int, width: int, heads: int = 8, vocabulary: int = 1000, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x


class Pooled(nn.Module):
    """An encoder's output averaged over the tokens: y float32 [batch, width]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask[:, :, None].float()
        return (self.encoder(ids, mask) * weights).sum(1) / weights.sum(1)


def encoder(
    folder: Path, model: nn.Module, tp: int, pp: int, length: int | None, largest: int, **declared: Any
) -> nn.Module:
    """Exports `model` (Encoder or Pooled) and writes its servable `encoder`. length: fixed, or None for 8 to 128."""
    prefix = "encoder." if isinstance(model, Pooled) else ""
    plan = Plan({prefix + name: place for name, place in BLOCKS_PLAN.items()} if tp > 1 else {})
    ids = torch.randint(0, 1000, (3, length or 10), generator=torch.Generator().manual_seed(1))
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=largest)}
    if length is None:
        dims[1] = torch.export.Dim("length", min=8, max=128)
    options: dict[str, Any] = {"dynamic_shapes": {"ids": dims, "mask": dims}, "output_names": ["y"]}
    mask = torch.ones_like(ids, dtype=torch.bool)
    layout: dict[str, Any] = {"tensor_parallel": tp, "pipeline_parallel": pp}
    export(model.eval(), (ids, mask), name="encoder", out=folder / "model", plan=plan, **layout, **options)
    write_servable(folder, "encoder", "ids, mask", "y", rank_size=tp * pp, stage_size=pp, **declared)
    return model
