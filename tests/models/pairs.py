"""Pairs of layers whose widths are cut: each costs one reduction."""

from __future__ import annotations

from torch import nn


class Pairs(nn.Module):
    """The layers of `count` pairs, from 8 to 16 and back, and a norm; what a test makes of them is its own forward."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 16) for _ in range(count))
        self.downs = nn.ModuleList(nn.Linear(16, 8) for _ in range(count))
        self.norm = nn.LayerNorm(8)
