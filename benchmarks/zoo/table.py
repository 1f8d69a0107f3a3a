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
    if not row["exported"]:
        reason = row["failure"].splitlines()[0].replace("|", "/")
        return f"| {row['model']} | {row['layout']} | | | | | | | | not exported: {reason[:200]} |"
    collectives = sum(row["collectives"].values())
    hand = "" if row["hand"] is None else f" ({row['hand']})"
    cells = [
        row["model"],
        row["layout"],
        f"{row['error']:.0e}",
        row["sizes"],
        f"{collectives}{hand}",
        _ratio(row["weights"], row["weights_largest"]),
        _ratio(row["flops"], row["flops_largest"]),
        f"{row['replicated']:.0%}",
        f"{row['trace_seconds']:.1f}",
        ", ".join(row["missed"]),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _ratio(mean: float | None, largest: float | None) -> str:
    if mean is None or largest is None:
        return ""
    return f"{mean:.2f}" if abs(largest - mean) < 0.005 else f"{mean:.2f} (largest {largest:.2f})"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows are without a miss."""
    met = sum(not row["missed"] for row in rows)
    exported = sum(row["exported"] for row in rows)
    matching = sum(row["matches"] for row in rows)
    return f"{len(rows)} rows: {exported} exported, {matching} match, {met} without a miss"


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Puts the table into docs/zoo.md."""
    text = DOCS.read_text()
    marked = f"{_BEGIN}\n{summary(rows)}.\n\n{table(rows)}\n{_END}"
    DOCS.write_text(re.sub(f"{_BEGIN}.*{_END}", lambda _: marked, text, flags=re.DOTALL))
