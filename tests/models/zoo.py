"""Small plain models, each with example inputs, dynamic shapes and a plan: `CASES[name]()` makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim


@dataclass
class Case:
    """One model to export on 2 tensor-parallel ranks; `collectives` is what a step may issue at most."""

    model: nn.Module
    args: tuple[Any, ...]
    plan: dict[str, str]
    dynamic_shapes: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    stages: int = 1
    cuts: tuple[str, ...] = ()


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


BATCH = Dim("batch", min=1, max=8)
LENGTH = Dim("length", min=2, max=16)


class Rotary(nn.Module):
    """Grouped-query attention with rotary embeddings and RMS norm, as Llama has them."""

    def __init__(self, width: int = 32, heads: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 64, bias=False)
        self.up = nn.Linear(width, 64, bias=False)
        self.down = nn.Linear(64, width, bias=False)
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, self.size, 2).float() / self.size))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        angles = torch.arange(t, device=x.device).float()[:, None] * self.frequencies[None]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        h = self.norm(x)
        q = self.rotate(self.q(h).view(b, t, -1, self.size).transpose(1, 2), cos, sin)
        k = self.rotate(self.k(h).view(b, t, -1, self.size).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, t, -1, self.size).transpose(1, 2)
        repeat = self.heads // self.groups
        k = k[:, :, None].expand(b, self.groups, repeat, t, self.size).reshape(b, self.heads, t, self.size)
        v = v[:, :, None].expand(b, self.groups, repeat, t, self.size).reshape(b, self.heads, t, self.size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).contiguous().view(b, t, -1))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@case
def rotary() -> Case:
    plan = dict.fromkeys(("?.q.weight", "?.k.weight", "?.v.weight", "?.gate.weight", "?.up.weight"), "Shard(0)")
    plan |= {"?.o.weight": "Shard(1)", "?.down.weight": "Shard(1)"}
    model = nn.Sequential(Rotary(), Rotary())
    return Case(model, (torch.randn(2, 5, 32),), plan, ({0: BATCH, 1: LENGTH},), collectives={"all_reduce": 4})


@case
def fused_attention() -> Case:
    """nn.MultiheadAttention: one fused projection, whose shards have a part of each of its three blocks."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    plan = {
        "self_attn.in_proj_*": "Shard(0, blocks=3)",
        "self_attn.out_proj.weight": "Shard(1)",
        "linear1.*": "Shard(0)",
        "linear2.weight": "Shard(1)",
    }
    return Case(layer, (torch.randn(3, 6, 32),), plan, ({0: BATCH, 1: LENGTH},), collectives={"all_reduce": 2})


class FusedByHand(nn.Module):
    """GPT-2's attention: a Conv1D-like addmm, split in three, softmax written out."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / 6)
        self.qkv_bias = nn.Parameter(torch.randn(3 * width))
        self.out = nn.Parameter(torch.randn(width, width) / 6)
        self.out_bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        fused = torch.addmm(self.qkv_bias, x.view(-1, width), self.qkv).view(b, t, 3 * width)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in fused.split(width, dim=2))
        scores = (q @ k.transpose(-1, -2)) / (q.shape[-1] ** 0.5)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        y = (scores @ v).transpose(1, 2).reshape(b, t, width)
        return torch.addmm(self.out_bias, y.view(-1, width), self.out).view(b, t, width)


@case
def fused_by_hand() -> Case:
    plan = {"qkv": "Shard(1, blocks=3)", "qkv_bias": "Shard(0, blocks=3)", "out": "Shard(0)"}
    return Case(FusedByHand(), (torch.randn(2, 5, 32),), plan, ({0: BATCH, 1: LENGTH},), collectives={"all_reduce": 1})


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.first(image)))
        x = self.second(x).mean((2, 3))
        return {"logits": self.head(x), "features": x}


@case
def convolutional() -> Case:
    plan = {"first.*": "Shard(0)", "second.weight": "Shard(1)", "head.*": "Shard(0)"}
    image = torch.randn(2, 3, 8, 8)
    return Case(Convolutional(), (image,), plan, {"image": {0: BATCH}}, collectives={"all_reduce": 1, "all_gather": 1})


class Tied(nn.Module):
    """A vocabulary-sharded embedding whose weight is the output head's too, cut into two stages between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, *, scale: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x * (ids.shape[1] ** -0.5)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x * scale)


@case
def tied() -> Case:
    return Case(
        Tied(),
        (torch.randint(0, 40, (2, 6)),),
        {"embedding.weight": "Shard(0)"},
        {"ids": {0: BATCH, 1: LENGTH}, "scale": None},
        {"scale": torch.randn(16)},
        {"all_reduce": 1, "all_gather": 1},
        2,
        ("layers.1",),
    )


class Attention(nn.Module):
    """nn.MultiheadAttention as most call it: with the weights, averaged over the heads, as a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x, key_padding_mask=padding)


@case
def attention_weights() -> Case:
    plan = {"attention.in_proj_*": "Shard(0, blocks=3)", "attention.out_proj.weight": "Shard(1)"}
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})
    return Case(Attention(), (torch.randn(2, 5, 32), padding), plan, shapes, collectives={"all_reduce": 2})


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, 8)) for linear in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


@case
def einsum() -> Case:
    plan = {"[qkv].*": "Shard(0)", "o.weight": "Shard(1)"}
    return Case(Einsum(), (torch.randn(2, 5, 32),), plan, ({0: BATCH, 1: LENGTH},), collectives={"all_reduce": 1})


class Recommender(nn.Module):
    """Tables of ids and dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(64, 8) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(28, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        features = [table(ids[:, index]) for index, table in enumerate(self.tables)]
        return self.mlp(torch.cat([*features, dense], dim=1)).squeeze(-1)


@case
def recommender() -> Case:
    args = (torch.randint(0, 64, (3, 3)), torch.randn(3, 4))
    plan = {"tables.*.weight": "Shard(0)", "mlp.0.*": "Shard(0)", "mlp.2.weight": "Shard(1)"}
    return Case(Recommender(), args, plan, ({0: BATCH}, {0: BATCH}), collectives={"all_reduce": 4})


class Parallel(nn.Module):
    """Attention's and the perceptron's terms are added before they are reduced: one all-reduce does for both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + (self.b(torch.tanh(self.a(h))) + self.down(F.gelu(self.up(h))))


@case
def parallel() -> Case:
    plan = {"a.*": "Shard(0)", "b.weight": "Shard(1)", "up.*": "Shard(0)", "down.weight": "Shard(1)"}
    return Case(Parallel(), (torch.randn(2, 5, 16),), plan, ({0: BATCH, 1: LENGTH},), collectives={"all_reduce": 1})


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = self.linear(x)[:, 1]
        y[:, 1:3].add_(1)
        return y


@case
def in_place() -> Case:
    return Case(InPlace(), (torch.randn(2, 4),), {"linear.*": "Shard(0)"}, ({0: BATCH},))


class Odds(nn.Module):
    """Sizes in expressions, several results of one operator, a constant, an input that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        first, second = self.up(x).chunk(2, dim=2)
        wide = F.relu(torch.cat((second, first), dim=2))
        both = torch.cat((self.down(wide), x, x[:, :1]), dim=1)
        top, index = both.topk(3, dim=-1)
        padded = F.pad(y, (0, 0, 1, 1))
        offset = padded + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        return top, index, offset.flatten(0, 1), y


@case
def odds() -> Case:
    shapes = {"x": {0: BATCH, 1: LENGTH}, "y": {0: BATCH}}
    plan = {"up.*": "Shard(0)", "down.weight": "Shard(1)"}
    return Case(Odds(), (torch.randn(2, 6, 8), torch.randn(2, 4, 8)), plan, shapes)
