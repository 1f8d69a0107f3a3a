"""`shardserve status`: what every servable, replica and rank of a server is doing."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from shardserve.cli.options.client import add_address_argument, add_connection_arguments, tls_config
from shardserve.client import status
from shardserve.errors import ShardserveError

EXAMPLE = """example:
  shardserve status 127.0.0.1:5500
  shardserve status 127.0.0.1:5500 --json | jq '.servables[].state'
"""
RANK_COLUMNS = ("rank", "stage", "host", "device", "pid", "state")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="show the state of a server's servables, replicas and ranks",
        description="Shows the state of every servable, replica and rank of a running server.",
        epilog=EXAMPLE,
    )
    add_address_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        found = status(args.address, args.timeout, tls_config(args))
    except ShardserveError as error:
        print(f"shardserve status: {args.address}: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(table(found)))
    return 0


def table(found: dict[str, Any]) -> list[str]:
    """The lines that people read."""
    lines: list[str] = []
    for servable in found["servables"]:
        reason = f" ({servable['reason']})" if servable["reason"] else ""
        lines.append(f"{servable['name']} version {servable['version']}: {servable['state']}{reason}")
        lines.append(f"  ranks {servable['rank_size']}, pipeline stages {servable['stage_size']}")
        for name, method in servable["methods"].items():
            lines.append(f"  {name}({', '.join(method['inputs'])}) -> {', '.join(method['outputs'])}")
        for replica in servable["replicas"]:
            generation = ".".join(map(str, replica["generation"]))
            where = f"  replica {replica['replica']}: {replica['state']}, generation {generation}"
            lines.append(f"{where}, restarts {replica['restarts']}")
            if replica["reason"]:
                lines.append(f"    {replica['reason']}")
            rows = [RANK_COLUMNS, *(tuple(_cell(rank, key) for key in RANK_COLUMNS) for rank in replica["ranks"])]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["    " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return lines or ["no servables"]


def _cell(rank: dict[str, Any], key: str) -> str:
    """An absent rank has neither device nor pid."""
    return "-" if key in ("device", "pid") and not rank[key] else str(rank[key])
