"""`shardserve trace`: when the last steps of a running server were where, as a trace that Perfetto shows."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from shardserve.cli import events
from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.cli.options.client import add_address_argument, add_connection_arguments, tls_config
from shardserve.cli.options.inputs import add_version_argument
from shardserve.cli.progress import shown_progress
from shardserve.client import timeline
from shardserve.errors import ConfigError, ShardserveError

EXAMPLE = """example:
  shardserve trace 127.0.0.1:5500 --out trace.json
  shardserve trace 127.0.0.1:5500 --servable matmul --seconds 2 --out trace.json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "trace",
        help="write when the last steps of a server were queued, sent, started and finished",
        description="Writes a trace of a running server's last steps (Chrome's JSON, for https://ui.perfetto.dev or "
        "chrome://tracing): when each was queued and sent by the Worker, and when each rank ran it. Gaps in the row of "
        "a rank are bubbles. The server records at all times, in memory; a trace only fetches it.",
        epilog=EXAMPLE,
    )
    add_address_argument(parser)
    parser.add_argument("--servable", default="", metavar="NAME", help="only this servable (default: all)")
    add_version_argument(parser, "its version; needs --servable")
    parser.add_argument(
        "--seconds",
        type=values.not_negative,
        default=0.0,
        metavar="S",
        help="wait so long first, and write only the steps that ended in that time (default: write all that the server "
        "remembers, at once)",
    )
    parser.add_argument("--out", type=values.path, required=True, metavar="FILE.json", help="the file to write")
    add_connection_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.version and not args.servable:
        raise WrongUsage("--version: give --servable, too")
    try:
        config = tls_config(args)
        values.check_folder(args.out)
        fetch = args.address, args.servable, args.version, args.timeout, config
        if args.seconds:
            # What is wrong is said before the wait, not after it.
            timeline(*fetch)
            _wait(args.seconds)
        recorded = timeline(*fetch)
    except ShardserveError as error:
        print(f"shardserve trace: {args.address}: {error}", file=sys.stderr)
        return 1
    for note in _notes(recorded, args.seconds):
        print(f"shardserve trace: {note}", file=sys.stderr)
    if args.seconds:
        recorded = events.last_seconds(recorded, args.seconds)
    _write(args.out, events.trace(recorded, args.address))
    replicas = [replica for servable in recorded["servables"] for replica in servable["replicas"]]
    steps = sum(len(replica["steps"]) for replica in replicas)
    ranks = sum(len(replica["ranks"]) for replica in replicas)
    print(f"{args.out}: steps: {steps}, replicas: {len(replicas)}, ranks: {ranks}; https://ui.perfetto.dev shows it")
    # Of several servables, those that could be asked are worth a trace; of none, nothing is.
    return 0 if replicas else 1


def _wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    with shown_progress() as progress:
        while (left := end - time.monotonic()) > 0:
            progress("recording, seconds", int(seconds - left), max(1, round(seconds)))
            time.sleep(min(left, 1.0))


def _notes(recorded: dict[str, Any], seconds: float) -> list[str]:
    """What the trace hasn't, and why."""
    notes = [] if recorded["servables"] else ["the server has no servable so far"]
    for servable in recorded["servables"]:
        name = f"{servable['name']} version {servable['version']}"
        if servable["reason"]:
            notes.append(f"{name}: {servable['reason']}")
        if servable["missing_ranks"]:
            notes.append(f"{name}: no answer from rank {', '.join(map(str, servable['missing_ranks']))}")
        for replica in servable["replicas"]:
            steps, since = replica["steps"], servable["now"] - seconds
            if seconds and len(steps) >= servable["capacity"] and steps[0]["answered"] > since:
                late = steps[0]["answered"] - since
                notes.append(
                    f"{name}, replica {replica['replica']}: the trace begins {late:.1f} s late, the server remembers "
                    f"{servable['capacity']} steps (SHARDSERVE_TIMELINE_STEPS)"
                )
    return notes


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
            file.write("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
