"""A model that kills its process on one input: `lowest` divided by -1 doesn't fit in int64, and torch's truncating
division on x86 doesn't look. Its step takes some milliseconds, so that clients fill a group's window."""

import torch
from torch import Tensor, nn
from torch.export import Dim

WIDTH = 512
LAYERS = 40
LOWEST = torch.iinfo(torch.int64).min


class Dividing(nn.Module):
    """x float32 [batch, 512], n and d int64 [batch] → y float32 [batch, 512], n / d towards zero int64 [batch]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        quotient = torch.div(n, d, rounding_mode="trunc")
        for _ in range(LAYERS):
            x = torch.tanh(x @ self.weight)
        return x, quotient


BATCH = Dim("batch", min=1, max=8)
DYNAMIC_SHAPES = {"x": {0: BATCH}, "n": {0: BATCH}, "d": {0: BATCH}}
EXAMPLE = (torch.ones(2, WIDTH), torch.tensor([7, 8]), torch.tensor([2, 3]))
