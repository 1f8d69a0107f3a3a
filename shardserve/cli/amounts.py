"""Bytes, FLOPs and placements as people read them."""

from __future__ import annotations

_STEPS = ("", "k", "M", "G", "T", "P", "E")


def of_bytes(count: int) -> str:
    """`512 B`, `20.5 kB`: powers of 1000, three digits."""
    return _scaled(count, "B")


def of_memory(weights: int, kept: int) -> str:
    """What a rank holds: its weights, and the buffers that it keeps between steps, if there are any."""
    return f"{of_bytes(weights)} + {of_bytes(kept)} kept" if kept else of_bytes(weights)


def of_flops(count: int | None) -> str:
    """`1.23 G`; `unknown` for None."""
    return "unknown" if count is None else _scaled(count, "").strip()


def of_ranks(placement: str) -> str:
    """Where a tensor that is placed so lies, in words."""
    if placement == "Replicate()":
        return "whole on each rank"
    if placement.startswith("Shard("):
        return f"in parts, {placement}"
    return f"in terms, {placement}" if placement else "placement unknown"


def _scaled(count: int, unit: str) -> str:
    size, step = float(count), 0
    while size >= 999.5 and step < len(_STEPS) - 1:
        size, step = size / 1000, step + 1
    digits = f"{count}" if not step else f"{size:.3g}" if size < 999.5 else f"{size:.0f}"
    return f"{digits} {_STEPS[step]}{unit}"
