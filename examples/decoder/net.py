"""A small decoder with its key-value cache in buffers: `prefill` reads a prompt, `decode` goes on by one word."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from shardserve.export import Subgraph

WORDS, WIDTH, HEADS, BLOCKS = 256, 64, 4, 4
LONGEST = 1024
PROMPT = 64


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [1, heads, t, size] by positions [t]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (torch.arange(half) / -half)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, LONGEST, WIDTH // HEADS), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        seen = self.attention_norm(x)
        q, k, v = (each(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        self.keys[:, :, positions] = rotate(k, positions)
        self.values[:, :, positions] = v
        mask = torch.arange(LONGEST) <= positions[:, None]
        y = F.scaled_dot_product_attention(rotate(q, positions), self.keys, self.values, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        seen = self.norm(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))


class Decoder(nn.Module):
    """Random weights, large enough that what it says depends on what it has read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(17)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("length", torch.zeros(1, dtype=torch.int64), persistent=False)
        for block in self.blocks:
            for weight in (block.q.weight, block.k.weight, block.v.weight, block.down.weight):
                nn.init.normal_(weight, std=0.3)

    def prefill(self, ids: Tensor) -> Tensor:
        """ids int64 [1, t], from position 0 → the scores of the next word, float32 [1, 256]."""
        scores = self.read(ids, torch.arange(ids.shape[1]))
        self.length.fill_(ids.shape[1])
        return scores

    def decode(self, word: Tensor) -> Tensor:
        """word int64 [1], at the position after what was read → the scores of the next, float32 [1, 256]."""
        scores = self.read(word[:, None], self.length)
        self.length += 1
        return scores

    def read(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x[:, -1]))


PLAN = {
    "parameters": {
        "blocks.*.[qkv].weight": "Shard(0)",
        "blocks.*.o.weight": "Shard(1)",
        "blocks.*.gate.weight": "Shard(0)",
        "blocks.*.up.weight": "Shard(0)",
        "blocks.*.down.weight": "Shard(1)",
    },
    "cuts": ["blocks.2"],
}


def make():
    """For `shardserve export net:make --name story --tp 2 --pp 2`: writes one folder for each subgraph."""
    length = Dim("length", min=2, max=PROMPT)
    ids = torch.arange(1, 9)[None]  # all different, so that --verify sees a key in another's place
    prefill = Subgraph((ids,), method="prefill", dynamic_shapes={"ids": {1: length}})
    decode = Subgraph((torch.tensor([9]),), method="decode")
    return Decoder(), (), {"subgraphs": {"prefill": prefill, "decode": decode}, "plan": PLAN}
