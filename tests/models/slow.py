"""A model whose step takes as long as its input is tall: about 50 us a row on one thread."""

import torch
from torch import Tensor, nn
from torch.export import Dim

WIDTH = 256
LAYERS = 60


class Slow(nn.Module):
    """x float32 [rows, 256] → float32 [rows, 256]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = torch.tanh(torch.relu(x @ self.up) @ self.down)
        return x


PLAN = {"up": "Shard(1)", "down": "Shard(0)"}
DYNAMIC_SHAPES = {"x": {0: Dim("rows", min=1, max=65536)}}
EXAMPLE = (torch.ones(3, WIDTH),)
