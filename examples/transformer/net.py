"""A small decoder-style transformer in plain PyTorch, written without a thought of sharding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with a boolean mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), attn_mask=mask
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalized before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """ids int64 [batch, length], attention_mask int64 [batch, length] (1: a token, 0: padding) → logits float32
    [batch, length, vocabulary]. A position sees itself and the tokens before it.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        positions: int = 64,
        width: int = 64,
        heads: int = 8,
        blocks: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(positions, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        before = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        # Padding sees itself, so that no row of the mask is empty.
        itself = torch.eye(length, dtype=torch.bool, device=ids.device)
        mask = (attention_mask[:, None, None, :].bool() & before) | itself
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def example() -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, object]]:
    """What `shardserve export net:example` takes: the model, example inputs, and the dims that may vary."""
    model = Transformer()
    ids = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 7:] = 0
    batch = torch.export.Dim("batch", min=1, max=32)
    length = torch.export.Dim("length", min=1, max=64)
    options: dict[str, object] = {
        "dynamic_shapes": {"ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
        "output_names": ["logits"],
    }
    return model, (ids, attention_mask), options
