"""The zoo's rows as a Markdown table, which docs/zoo.md holds between two marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"

_HEAD = (
    "| model | layout | error / scale | sizes | collectives (hand) | bytes | FLOPs | replicated | trace s | missed |"
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model and layout."""
    columns = _HEAD.count("|") - 1
    return "\n".join([_HEAD, "|" + " --- |" * columns, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    if row["failure"] is not None:
        reason = row["failure"].splitlines()[0].replace("|", "/")
        return f"| {row['model']} | {row['layout']} | | | | | | | | not exported: {reason[:200]} |"
    hand = "" if row["hand"] is None else f" ({row['hand']})"
    cells = [
        row["model"],
        row["layout"],
        f"{row['error']:.0e}",
        row["sizes"],
        f"{row['collectives']}{hand}",
        _ratio(row["bytes"], row["bytes_largest"]),
        _ratio(row["flops"], row["flops_largest"]),
        f"{row['replicated']:.0%}",
        f"{row['trace_seconds']:.1f}",
        ", ".join(row["missed"]),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _ratio(mean: float, largest: float) -> str:
    return f"{mean:.2f}" if abs(largest - mean) < 0.005 else f"{mean:.2f} (largest {largest:.2f})"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows are without a miss."""
    exported = [row for row in rows if row["failure"] is None]
    matching, met = sum(row["matches"] for row in exported), sum(not row["missed"] for row in rows)
    return f"{len(rows)} rows: {len(exported)} exported, {matching} match, {met} without a miss"


def reasons(rows: Sequence[dict[str, Any]]) -> str:
    """Of each model in its first tensor-parallel layout: the parameters that stay whole, and why."""
    lines: list[str] = []
    told: set[str] = set()
    for row in rows:
        if row["failure"] is None and row["why"] and row["model"] not in told:
            told.add(row["model"])
            lines += [f"- **{row['model']}** ({row['layout']}): {row['why'][0]}", *(f"  - {w}" for w in row["why"][1:])]
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Puts the table into docs/zoo.md."""
    text = DOCS.read_text()
    whole = f"## What stays whole, and why\n\n{reasons(rows)}"
    marked = f"{_BEGIN}\n{summary(rows)}.\n\n{table(rows)}\n\n{whole}\n{_END}"
    DOCS.write_text(re.sub(f"{_BEGIN}.*{_END}", lambda _: marked, text, flags=re.DOTALL))
