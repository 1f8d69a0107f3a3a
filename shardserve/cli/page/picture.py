"""The partition of an export as SVG: pipeline stages from top to bottom, their ranks side by side."""

from __future__ import annotations

import math
from html import escape

from shardserve.amounts import of_bytes, of_flops
from shardserve.cli.options.values import counted
from shardserve.shards.summary import RankSummary, Summary

# In units of the drawing, which are about a phone's pixels.
WIDTH = 400
_LEFT, _TOP, _HEIGHT, _CAPTION, _BETWEEN, _GAP = 8, 20, 44, 18, 46, 2
_LETTER = 7.2  # the width of one, at most, at 12 units
_HEAD = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" markerHeight="10" \
markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z"/></marker>'


def picture(found: Summary) -> str:
    """An <svg>; a stage's row is as wide as its weights, and the arrows as thick as what goes along them."""
    stages = found.stages
    largest = max(sum(rank.config.parameter_bytes for rank in ranks) for ranks in stages) or 1
    most = max((ranks[0].sent_bytes for ranks in stages[:-1]), default=1) or 1
    parts: list[str] = []
    y = _TOP
    for index, ranks in enumerate(stages):
        parts.append(f'<text x="{_LEFT}" y="{y - 6}" class="stage">stage {index}</text>')
        x = float(_LEFT)
        room = WIDTH - 2 * _LEFT - _GAP * (len(ranks) - 1)
        for rank in ranks:
            width = max(room * rank.config.parameter_bytes / largest, 3.0)
            parts.append(_rank(rank, x, y, width))
            x += width + _GAP
        y += _HEIGHT
        parts.append(f'<text x="{_LEFT}" y="{y + 13}" class="small">{escape(_collectives(ranks[0]))}</text>')
        y += _CAPTION
        if index < len(stages) - 1:
            parts.append(_arrow(ranks[0], y, most))
            y += _BETWEEN
    label = escape(f"{counted(len(stages), 'pipeline stage')} of {counted(len(stages[0]), 'rank')}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 4}" role="img" aria-label="{label}">\n<defs>{_HEAD}</defs>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _rank(rank: RankSummary, x: float, y: float, width: float) -> str:
    number, weights = f"rank {rank.config.rank}", of_bytes(rank.config.parameter_bytes)
    told = f"{number}: {weights} of weights, {of_flops(rank.flops)} FLOPs, {counted(rank.operators, 'operator')}"
    lines = [text for text in (number, weights, f"{of_flops(rank.flops)} FLOP") if len(text) * _LETTER < width - 6]
    if not lines and len(str(rank.config.rank)) * _LETTER < width:
        lines = [str(rank.config.rank)]
    middle = x + width / 2
    written = "".join(
        f'<text x="{middle:.1f}" y="{y + _HEIGHT / 2 + 4 + 13 * (line - (len(lines) - 1) / 2):.1f}" class="in">'
        f"{escape(text)}</text>"
        for line, text in enumerate(lines)
    )
    box = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_HEIGHT}" rx="3"/>'
    return f"<g><title>{escape(told)}</title>{box}{written}</g>"


def _collectives(rank: RankSummary) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in rank.collective_counts.items())
    return f"{kinds} a step: {of_bytes(rank.collective_bytes)}" if kinds else "no collectives"


def _arrow(rank: RankSummary, y: float, most: int) -> str:
    thickness = 1 + 5 * math.sqrt(rank.sent_bytes / most)
    text = f"{counted(len(rank.sends), 'tensor')}, {of_bytes(rank.sent_bytes)}"
    names = escape(", ".join(sent.spec.name for sent in rank.sends))
    return (
        f'<g><title>{names}</title><line x1="30" y1="{y + 2}" x2="30" y2="{y + _BETWEEN - 24}" '
        f'stroke-width="{thickness:.1f}" marker-end="url(#head)"/>'
        f'<text x="46" y="{y + 16}" class="small">{escape(text)}</text></g>'
    )
