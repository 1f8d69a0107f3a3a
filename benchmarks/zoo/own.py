"""Models of other kinds, written here: recommenders, recurrent nets, graphs, odd structures, small dtypes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import BATCH, LENGTH, Case, model, tokens

WIDTH = 64


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU after each but the last."""
    made: list[nn.Module] = []
    for before, after in pairwise(widths):
        made += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*made[:-1])


class Recommender(nn.Module):
    """Tables for categories, layers for numbers, products of all pairs, layers over those."""

    def __init__(self, tables: int = 4, rows: int = 2048, width: int = 16, numbers: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = layers(numbers, 64, width)
        pairs = (tables + 1) * tables // 2
        self.top = layers(pairs + width, 64, 1)
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, 1), persistent=False)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        rows = [table(categories[:, index]) for index, table in enumerate(self.tables)]
        stacked = torch.stack([dense, *rows], 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        chosen = products[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([dense, chosen], 1)))


@model
def dlrm() -> Case:
    kwargs = {"numbers": torch.randn(3, 8), "categories": tokens(2048, 3, 4)}
    # One reduction of all that the tables give, one each of the layers below and above.
    return Case(Recommender(), kwargs, {"numbers": {0: BATCH}, "categories": {0: BATCH}}, 1 + 2, bounded=True)


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, a tag for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return self.head(hidden)


@model
def lstm_tagger() -> Case:
    return Case(Tagger(), {"ids": tokens(256, 3, 7)}, {"ids": {0: BATCH, 1: LENGTH}})


class MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(patches, 64), nn.GELU(), nn.Linear(64, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(MixerBlock(16, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@model
def mlp_mixer() -> Case:
    return Case(Mixer(), {"x": torch.randn(3, 3, 32, 32)}, {"x": {0: BATCH}}, 2 * 2 + 1)


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with norms."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels down, two up, with what was at each level joined on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(1, 16), double(16, 32)])
        self.middle = double(32, 64)
        self.ups = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.joined = nn.ModuleList([double(64, 32), double(32, 16)])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for up, block in zip(self.ups, self.joined, strict=True):
            x = block(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


@model
def unet() -> Case:
    return Case(UNet(), {"x": torch.randn(3, 1, 16, 16)}, {"x": {0: BATCH}})


class GraphNet(nn.Module):
    """Message passing over a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.messages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.updates = nn.ModuleList(layers(2 * WIDTH, 128, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> dict[str, Tensor]:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        x = self.embed(nodes)
        for message, update in zip(self.messages, self.updates, strict=True):
            received = adjacency @ message(x) / degree
            x = x + update(torch.cat([x, received], -1))
        return {"nodes": self.head(x), "graph": x.amax(1)}


@model
def graph_network() -> Case:
    kwargs = {"nodes": torch.randn(3, 7, 16), "adjacency": (torch.rand(3, 7, 7) > 0.5).float()}
    return Case(GraphNet(), kwargs, {"nodes": {0: BATCH, 1: LENGTH}, "adjacency": {0: BATCH, 1: LENGTH, 2: LENGTH}})


class Nested(nn.Module):
    """Inputs and outputs in dicts and tuples, one of them None, one not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers(16, 128, WIDTH)
        self.second = layers(8, 128, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, features: dict[str, Any], scale: float = 1.0, extra: Tensor | None = None) -> dict[str, Any]:
        left, (right, weight) = features["left"], features["right"]
        hidden = self.first(left) + weight[:, None] * self.second(right) * scale
        return {"scores": (self.head(hidden), hidden.argmax(-1)), "hidden": {"mean": hidden.mean(-1), "none": extra}}


@model
def nested() -> Case:
    features = {"left": torch.randn(3, 16), "right": (torch.randn(3, 8), torch.rand(3))}
    shapes: dict[str, Any] = {
        "features": {"left": {0: BATCH}, "right": ({0: BATCH}, {0: BATCH})}, "scale": None, "extra": None
    }  # fmt: skip
    return Case(Nested(), {"features": features, "scale": 0.5, "extra": None}, shapes)


class Counter(nn.Module):
    """Normalizes by a running mean that each call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(16, 128, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.net(x - self.mean) / self.steps


@model
def updated_buffers() -> Case:
    return Case(Counter(), {"x": torch.randn(3, 16)}, {"x": {0: BATCH}}, 1)


class Tied(nn.Module):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, WIDTH)
        self.block = layers(WIDTH, 256, WIDTH)
        self.head = nn.Linear(WIDTH, 1024, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.block(x))


@model
def tied_weights() -> Case:
    return Case(Tied(), {"ids": tokens(1024, 3, 7)}, {"ids": {0: BATCH, 1: LENGTH}}, 3)


class Twice(nn.Module):
    """One block, run twice, and once for another input."""

    def __init__(self) -> None:
        super().__init__()
        self.block = layers(WIDTH, 256, WIDTH)
        self.last = layers(WIDTH, 256, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.block(self.block(x)) * self.block(y))


@model
def shared_module() -> Case:
    kwargs = {"x": torch.randn(3, WIDTH), "y": torch.randn(3, WIDTH)}
    return Case(Twice(), kwargs, {"x": {0: BATCH}, "y": {0: BATCH}}, 4)


class Block(nn.Module):
    """A transformer block with a fused projection, in whichever dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def _small_dtype(dtype: torch.dtype) -> Case:
    net = nn.Sequential(Block(), Block()).to(dtype)
    # A sum in another order differs in the last of 8 (bfloat16) or 11 bits, and that grows through two blocks.
    tolerance = 20 * torch.finfo(dtype).eps
    x = torch.randn(3, 7, WIDTH).to(dtype)
    return Case(net, {"input": x}, {"input": {0: BATCH, 1: LENGTH}}, 4, bounded=True, tolerance=tolerance)


@model
def bf16() -> Case:
    return _small_dtype(torch.bfloat16)


@model
def fp16() -> Case:
    return _small_dtype(torch.float16)


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each output, multiplied out in fp32."""

    weight: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs) * 2 / (127 * inputs**0.5))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)


@model
def int8_linear() -> Case:
    net = nn.Sequential(Int8Linear(WIDTH, 256), nn.GELU(), Int8Linear(256, WIDTH))
    return Case(net, {"input": torch.randn(3, WIDTH)}, {"input": {0: BATCH}}, 1)
