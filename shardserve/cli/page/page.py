"""`shardserve inspect --html`: an export as one page of HTML, which needs nothing beside itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from shardserve.amounts import of_bytes, of_flops, of_memory, of_ranks
from shardserve.cli.options.values import counted
from shardserve.cli.page.picture import picture
from shardserve.cli.page.style import SCRIPT, STYLE
from shardserve.shards.config import TensorSpec, describe
from shardserve.shards.graph import Parameter
from shardserve.shards.summary import RankSummary, Sent, Summary, parameter_bytes

# Nothing is fetched and nothing is sent, whatever the names in the shards say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(found: Summary) -> str:
    """The page: the partition drawn, a table of its ranks, what crosses each cut, and all parameters."""
    first = found.first
    title = escape(f"{first.name}: {_layout(found)}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(first.name)}</h1>
<p>{escape(_layout(found))}, export <code>{escape(first.export_id)}</code>{escape(_at(found))}</p>
{_signature(found)}
<h2>Partition</h2>
{picture(found)}
<p class="note">A rank is as wide as its weights are large. Between stages: what each rank sends to its peer.</p>
<h2>Ranks</h2>
{_ranks(found)}
{_crossing(found)}
<h2>Parameters</h2>
{_parameters(found)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _layout(found: Summary) -> str:
    return f"{counted(found.first.rank_size, 'rank')}, {counted(found.first.stage_size, 'pipeline stage')}"


def _at(found: Summary) -> str:
    if not found.dims:
        return ""
    return f"; a step at {', '.join(f'{name} = {size}' for name, size in found.dims.items())} ({found.sizes_of})"


def _signature(found: Summary) -> str:
    signature = found.first.signature
    lines = [f"dim <b>{escape(name)}</b>: {escape(str(limits))}" for name, limits in signature.dims.items()]
    lines += [f"condition: <code>{escape(condition)}</code>" for condition in signature.conditions]
    for what, specs in (("input", signature.inputs), ("output", signature.outputs)):
        lines += [f"{what} {_tensor(spec)}" for spec in specs]
    return _list(lines)


def _ranks(found: Summary) -> str:
    return _table(
        ("Rank", "Stage", "Parameters", "Weights", "FLOPs", "Operators", "Sends", "Collectives a step"),
        ([*_cells(rank)] for rank in found.ranks),
        numbers=7,
    )


def _cells(rank: RankSummary) -> Iterable[str]:
    yield str(rank.config.rank)
    yield str(rank.config.stage)
    yield f"{rank.parameter_count:,}"
    yield escape(of_memory(rank.config.parameter_bytes, rank.state_bytes))
    yield escape(of_flops(rank.flops))
    yield str(rank.operators)
    yield escape(of_bytes(rank.sent_bytes))
    kinds = ", ".join(f"{count} {kind}" for kind, count in rank.collective_counts.items())
    yield escape(f"{kinds}: {of_bytes(rank.collective_bytes)}" if kinds else "none")


def _crossing(found: Summary) -> str:
    parts: list[str] = []
    for before, after in pairwise(found.stages):
        stage = before[0].config.stage
        parts.append(f"<h2>From stage {stage} to stage {after[0].config.stage}</h2>")
        parts.append(_list([_sent(sent) for sent in before[0].sends]))
    return "\n".join(parts)


def _sent(sent: Sent) -> str:
    text = f"{_tensor(sent.spec)}: {escape(of_bytes(sent.bytes))}"
    if sent.origin is None or not sent.origin.tensor:
        return text
    module = f" of <code>{escape(sent.origin.module)}</code>" if sent.origin.module else ""
    return f"{text}{module}, {escape(of_ranks(sent.origin.placement))}"


def _parameters(found: Summary) -> str:
    holders: dict[str, list[tuple[int, Parameter]]] = defaultdict(list)
    for rank in found.ranks:
        for name, parameter in rank.stored.items():
            holders[name].append((rank.config.rank, parameter))
    rows: list[list[str]] = []
    for name, held in holders.items():
        shapes = dict.fromkeys(describe(parameter.shape) for _, parameter in held)
        total = sum(parameter_bytes(parameter) for _, parameter in held)
        cells = (name, held[0][1].dtype, ", ".join(shapes), of_bytes(total), _spans([rank for rank, _ in held]))
        rows.append([escape(cell) for cell in cells])
    search = '<input id="search" type="search" placeholder="name, dtype, shape or rank" aria-label="Search parameters">'
    table = _table(("Name", "Type", "Shape on a rank", "Bytes in all", "Ranks"), rows, identity="parameters")
    return f'{search}\n<p class="note" id="count" aria-live="polite">{counted(len(rows), "parameter")}</p>\n{table}'


def _spans(ranks: Sequence[int]) -> str:
    """`0-3, 6`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def _tensor(spec: TensorSpec) -> str:
    return f"<b>{escape(spec.name)}</b> <code>{escape(f'{spec.dtype} {describe(spec.shape)}')}</code>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in lines) + "\n</ul>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], identity: str = "", numbers: int = 0) -> str:
    """`rows` of HTML; the first `numbers` columns are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' * (index < numbers)}>{cell}</{tag}>" for index, cell in enumerate(row))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    named = f' id="{identity}"' if identity else ""
    return f"""<div class="wide"><table{named}>
<thead><tr>{cells("th", heads)}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>"""
