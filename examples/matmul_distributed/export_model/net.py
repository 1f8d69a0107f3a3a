"""The model of the example: one matrix product, negated."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """x float32 [batch, 96] → float32 [batch, 16]. The weight is 0.5 everywhere, or random if a seed is given."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        weight = torch.full((96, 16), 0.5)
        if seed is not None:
            weight = torch.randn(96, 16, generator=torch.Generator().manual_seed(seed)) / 96**0.5
        self.w = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return -(x @ self.w)
