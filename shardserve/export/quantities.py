"""Bytes, seconds and FLOPs as people read them."""

from __future__ import annotations

import math

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def described_bytes(count: int, up: bool = False) -> str:
    """As "1.23 GiB": three digits, the last of them rounded up if `up`."""
    power = 0
    while power < len(_BINARY) - 1 and count >= 1024 ** (power + 1):
        power += 1
    return f"{_three(count / 1024**power, up)} {_BINARY[power]}"


def described_seconds(seconds: float) -> str:
    """As "1.23 ms"."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def described_flops(flops: int) -> str:
    """As "1.23 GFLOPs"."""
    power = 0
    while power < 4 and flops >= 1000 ** (power + 1):
        power += 1
    return f"{_three(flops / 1000**power)} {('', 'K', 'M', 'G', 'T')[power]}FLOPs"


def _three(value: float, up: bool = False) -> str:
    if value <= 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(value)))
    rounded = math.ceil(value * 10**digits - 1e-9) / 10**digits if up else round(value, digits)
    return f"{rounded:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{rounded:.0f}"
