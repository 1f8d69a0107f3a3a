"""`shardserve inspect`: what each shard of an export holds, does and sends."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from shardserve.cli.progress import shown_progress
from shardserve.cli.values import counted
from shardserve.errors import ShardError
from shardserve.shards.config import CONFIG_FILE, ShardConfig, TensorSpec

EXAMPLE = """example:
  shardserve inspect examples/transformer/model
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what each shard of an export holds, does and sends",
        description="Shows an export: its inputs and outputs, and for each pipeline stage and rank the weights, the "
        "operators, the collectives of a step and what crosses to the next stage.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="holds device0, device1, …")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with shown_progress() as progress:
        directories = _devices(args.directory)
        shards = []
        for done, directory in enumerate(directories):
            progress("reading shards", done, len(directories))
            shards.append(_shard(directory))
    first = shards[0]["config"]
    for shard in shards:
        if shard["config"].export_id != first.export_id:
            raise ShardError(f"{shard['directory']} and {shards[0]['directory']} are of different exports")
    if args.json:
        print(json.dumps([{**shard, "config": shard["config"].to_dict()} for shard in shards], indent=2))
        return 0
    ranks, stages = counted(first.rank_size, "rank"), counted(first.stage_size, "pipeline stage")
    print(f"{first.name}: {ranks}, {stages}, export {first.export_id}")
    for name, bounds in first.signature.dims.items():
        print(f"  dim {name}: {bounds}")
    for condition in first.signature.conditions:
        print(f"  condition: {condition}")
    _print_tensors("input", first.signature.inputs)
    _print_tensors("output", first.signature.outputs)
    print(f"{'rank':>6}  {'stage':>5}  {'weights':>12}  {'operators':>9}  collectives a step")
    for shard in shards:
        config = shard["config"]
        collectives = ", ".join(f"{count} {kind}" for kind, count in shard["collectives"].items()) or "none"
        size = f"{config.parameter_bytes / 1e6:.3f} MB"
        print(f"{config.rank:>6}  {config.stage:>5}  {size:>12}  {shard['operators']:>9}  {collectives}")
    for shard in shards:
        config = shard["config"]
        if config.coordinate == 0 and config.stage < config.stage_size - 1:
            print(f"  from stage {config.stage} to stage {config.stage + 1}, rank to rank:")
            _print_tensors("  tensor", config.sends)
    return 0


def _devices(directory: Path) -> list[Path]:
    first = directory / "device0" / CONFIG_FILE
    if not first.is_file():
        raise ShardError(f"there is no {first}: {directory} is not the folder of an export")
    return [directory / f"device{rank}" for rank in range(ShardConfig.load(first).rank_size)]


def _shard(directory: Path) -> dict[str, Any]:
    # Imported here: it brings torch, which takes seconds that no other command should pay.
    from shardserve.shards.graph import GraphFile

    config = ShardConfig.load(directory / CONFIG_FILE)
    graph = GraphFile.load(directory / config.graph_file)
    kinds = Counter(node.op.removeprefix("collective.") for node in graph.nodes if node.op.startswith("collective."))
    return {
        "directory": str(directory),
        "config": config,
        "operators": len(graph.nodes) - sum(kinds.values()),
        "collectives": dict(kinds),
    }


def _print_tensors(what: str, specs: tuple[TensorSpec, ...]) -> None:
    for spec in specs:
        print(f"  {what} {spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]")
