"""Bytes, FLOPs, seconds and placements as people read them."""

from __future__ import annotations

_STEPS = ("", "k", "M", "G", "T", "P", "E")


def of_bytes(count: int, up: bool = False) -> str:
    """`512 B`, `20.5 kB`: powers of 1000, three digits; `up`: never less than `count`."""
    return _scaled(count, "B", up)


def of_memory(weights: int, kept: int) -> str:
    """What a rank holds: its weights, and the buffers that it keeps between steps, if there are any."""
    return f"{of_bytes(weights)} + {of_bytes(kept)} kept" if kept else of_bytes(weights)


def of_flops(count: int | None) -> str:
    """`1.23 G`; `unknown` for None."""
    return "unknown" if count is None else _scaled(count, "").strip()


def of_seconds(seconds: float) -> str:
    """`1.23 ms`, three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def of_ranks(placement: str) -> str:
    """Where a tensor that is placed so lies, in words."""
    if placement == "Replicate()":
        return "whole on each rank"
    if placement.startswith("Shard("):
        return f"in parts, {placement}"
    return f"in terms, {placement}" if placement else "placement unknown"


def _scaled(count: int, unit: str, up: bool = False) -> str:
    if up and count >= 1000:
        unseen = 10 ** (len(str(count)) - 3)
        count = -(-count // unseen) * unseen
    size, step = float(count), 0
    while size >= 999.5 and step < len(_STEPS) - 1:
        size, step = size / 1000, step + 1
    return f"{_digits(size) if step else count} {_STEPS[step]}{unit}"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
