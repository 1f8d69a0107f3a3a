"""Attention whose one projection gives four heads of queries, two of keys and values, taken apart in several ways."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Apart = Callable[[Tensor], tuple[Tensor, ...]]
"""[b, t, 32] → queries [b, 4, t, 4], keys and values [b, 2, t, 4]."""


def _heads(*parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)


def by_split(fused: Tensor) -> tuple[Tensor, ...]:
    return _heads(*fused.split([16, 8, 8], -1))


def by_slices(fused: Tensor) -> tuple[Tensor, ...]:
    return _heads(fused[..., :16], fused[..., 16:-8], fused[..., -8:])


def by_heads(fused: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in fused.view(*fused.shape[:-1], 8, 4).split([4, 2, 2], 2))


def by_slices_of_heads(fused: Tensor) -> tuple[Tensor, ...]:
    heads = fused.view(*fused.shape[:-1], 8, 4).transpose(1, 2)
    return heads[:, :4], heads[:, 4:6], heads[:, 6:]


def keys_and_values_together(fused: Tensor) -> tuple[Tensor, ...]:
    query, both = fused.split([16, 16], -1)
    return _heads(query, *both.chunk(2, -1))


class Fused(nn.Module):
    """x [b, t, 16] → the same shape."""

    def __init__(self, apart: Apart = by_split) -> None:
        super().__init__()
        self.qkv, self.o, self.apart = nn.Linear(16, 32), nn.Linear(16, 16), apart

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.apart(self.qkv(x)), enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))
