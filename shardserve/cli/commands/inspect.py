"""`shardserve inspect`: what each shard of an export holds, does and sends."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardserve.amounts import of_bytes, of_flops, of_memory, of_ranks
from shardserve.cli.options import values
from shardserve.cli.options.values import counted
from shardserve.cli.progress import shown_progress
from shardserve.errors import ConfigError
from shardserve.shards.config import TensorSpec, describe

if TYPE_CHECKING:
    from shardserve.shards.summary import RankSummary, Sent, Summary

EXAMPLE = """example:
  shardserve inspect examples/transformer/model
  shardserve inspect examples/transformer/model --dims batch=8,length=64 --html shards.html
"""

_COLUMNS = ("rank", "stage", "parameters", "weights", "FLOPs", "operators", "sends", "collectives a step")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what each shard of an export holds, does and sends",
        description="Shows an export: its inputs and outputs, and for each pipeline stage and rank the parameters, "
        "their bytes, the FLOPs and collectives of a step and what crosses to the next stage, at given sizes of the "
        "dynamic dims. Reads configs and graphs, not the weights.",
        epilog=EXAMPLE,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="holds device0, device1, …")
    parser.add_argument(
        "--dims",
        type=values.dims,
        default={},
        metavar="NAME=SIZE,…",
        help="sizes of dynamic dims (default: the example's that the model was exported with)",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument(
        "--html",
        type=values.path,
        metavar="FILE",
        help="write one self-contained page with a picture of the partition (default: print a table)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.html is not None:
        values.check_folder(args.html)
    # Imported here: it brings torch, which takes seconds that no other command should pay.
    from shardserve.shards import summary

    with shown_progress() as progress:
        found = summary.read(args.directory, args.dims, progress)
    if found.others:
        named = ", ".join(path.name for path in found.others)
        print(
            f"shardserve inspect: {named}: not of this export, of {counted(len(found.ranks), 'rank')}", file=sys.stderr
        )
    if args.json:
        print(json.dumps([{**rank.to_dict(), "dims": found.dims} for rank in found.ranks], indent=2))
    elif args.html is not None:
        from shardserve.cli.page.page import page

        try:
            args.html.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{args.html}: {error.strerror}") from error
        print(f"wrote {args.html}")
    else:
        _print(found)
    return 0


def _print(found: Summary) -> None:
    first = found.first
    ranks, stages = counted(first.rank_size, "rank"), counted(first.stage_size, "pipeline stage")
    print(f"{first.name}: {ranks}, {stages}, export {first.export_id}")
    for name, bounds in first.signature.dims.items():
        print(f"  dim {name}: {bounds}")
    for condition in first.signature.conditions:
        print(f"  condition: {condition}")
    _print_tensors("input", first.signature.inputs)
    _print_tensors("output", first.signature.outputs)
    if found.dims:
        print(f"a step at {', '.join(f'{name} = {size}' for name, size in found.dims.items())} ({found.sizes_of}):")
    rows = [_COLUMNS, *(_row(rank) for rank in found.ranks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS) - 1)]
    for row in rows:
        print("  ".join([cell.rjust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]))
    for ranks_of_stage in found.stages[:-1]:
        stage = ranks_of_stage[0].config.stage
        print(f"  from stage {stage} to stage {stage + 1}, rank to rank:")
        for sent in ranks_of_stage[0].sends:
            print(f"    {_sent(sent)}")


def _row(rank: RankSummary) -> tuple[str, ...]:
    config = rank.config
    kinds = ", ".join(f"{count} {kind}" for kind, count in rank.collective_counts.items())
    return (
        str(config.rank),
        str(config.stage),
        f"{rank.parameter_count:,}",
        of_memory(config.parameter_bytes, rank.state_bytes),
        of_flops(rank.flops),
        str(rank.operators),
        of_bytes(rank.sent_bytes),
        f"{kinds}: {of_bytes(rank.collective_bytes)}" if kinds else "none",
    )


def _sent(sent: Sent) -> str:
    said = [of_bytes(sent.bytes)]
    if sent.origin is not None and sent.origin.tensor:
        said += [f"of {sent.origin.module}"] * bool(sent.origin.module) + [of_ranks(sent.origin.placement)]
    return f"{sent.spec.name} ({', '.join(said)}): {sent.spec.dtype} {describe(sent.spec.shape)}"


def _print_tensors(what: str, specs: tuple[TensorSpec, ...]) -> None:
    for spec in specs:
        print(f"  {what} {spec.name}: {spec.dtype} {describe(spec.shape)}")
