"""`shardserve bench`: throughput and latency of a running server against the number of its clients."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shardserve
from shardserve.cli import plot
from shardserve.cli.codes import WrongUsage
from shardserve.cli.load import GIVE_UP, Level, loaded, one_line
from shardserve.cli.options import inputs, values
from shardserve.cli.options.client import add_address_argument, add_connection_arguments, tls_config
from shardserve.cli.progress import shown_progress
from shardserve.client import codec
from shardserve.errors import ConfigError, ShardserveError
from shardserve.progress import Progress
from shardserve.wire.stubs import ms_service_pb2 as pb

CONCURRENCY = "1,2,4,8,16,32"
BUSY_CLIENT = 0.9
EXAMPLE = """example:
  shardserve bench 127.0.0.1:5500 matmul predict --input x=x.npy --concurrency 1,8
  shardserve bench 127.0.0.1:5500 matmul predict --input x=x.npy --concurrency 1,2,4 --seconds 1 \\
      --json matmul.json --plot matmul.svg
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure a server's throughput and latency against the number of clients",
        description="Drives a running server over gRPC with so many clients, each of which sends its next request when "
        "it has its last answer, and prints requests a second and percentiles of the latency for each number of them. "
        f"Exit code 1 if any request failed. Ends early when nothing can be served for {GIVE_UP:g} s (UNAVAILABLE).",
        epilog=EXAMPLE,
    )
    add_address_argument(parser)
    inputs.add_method_arguments(parser)
    inputs.add_input_argument(parser)
    parser.add_argument(
        "--npz",
        action="append",
        default=[],
        type=values.path,
        metavar="FILE.npz",
        help="an instance whose inputs are the file's arrays, in place of --input; several are sent in turn",
    )
    parser.add_argument(
        "--instances",
        type=values.count,
        default=1,
        metavar="N",
        help="of which each request has so many copies (default %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=_counts,
        default=CONCURRENCY,
        metavar="LIST",
        help="numbers of clients, with commas (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=_positive, default=5.0, metavar="S", help="to measure for each of them (default %(default)g)"
    )
    parser.add_argument(
        "--warmup",
        type=values.not_negative,
        default=1.0,
        metavar="S",
        help="seconds before that, which aren't counted (default %(default)g)",
    )
    parser.add_argument("--json", type=values.path, metavar="FILE", help="write all figures as JSON (default: none)")
    parser.add_argument(
        "--plot",
        type=_plot_file,
        metavar="FILE",
        help="draw them to a .svg or .png, which needs the extra `bench` (default: none)",
    )
    add_connection_arguments(parser)
    parser.set_defaults(run=run)


def _counts(text: str) -> list[int]:
    counts = [values.count(part) for part in text.split(",")]
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
    return counts


def _positive(text: str) -> float:
    value = values.not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} isn't more than 0")
    return value


def _plot_file(text: str) -> Path:
    if not text.endswith(plot.SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither with {' nor with '.join(plot.SUFFIXES)}")
    return values.path(text)


def run(args: argparse.Namespace) -> int:
    if args.input and args.npz:
        raise WrongUsage("--input and --npz: give one of them")
    try:
        for file in (args.json, args.plot):
            if file is not None:
                values.check_folder(file)
        if args.plot is not None:
            plot.check_installed()
        requests = _requests(args)
        with shown_progress() as progress:
            levels = asyncio.run(_measure(args, requests, progress))
    except ShardserveError as error:
        print(f"shardserve bench: {args.address}: {one_line(error)}", file=sys.stderr)
        return 1
    found = [level.summary(args.instances) for level in levels]
    print("\n".join(table(found)))
    sys.stdout.flush()
    for level in levels:
        if level.client_cpu > BUSY_CLIENT:
            print(
                f"shardserve bench: with {level.concurrency} clients this command itself used {level.client_cpu:.0%} "
                "of a core: the server may be faster than it can ask",
                file=sys.stderr,
            )
    _write(args, found)
    return _tell_errors(levels)


def _requests(args: argparse.Namespace) -> list[pb.PredictRequest]:
    spec = codec.servable_spec(args.name, args.method, args.version)
    instances = [inputs.load_arrays(path) for path in args.npz] or [inputs.load_instance(args.input)]
    return [codec.encode_request(spec, [instance] * args.instances) for instance in instances]


async def _measure(args: argparse.Namespace, requests: Sequence[pb.PredictRequest], progress: Progress) -> list[Level]:
    levels = []
    async with loaded(args.address, tls_config(args), requests, args.timeout) as load:
        for done, concurrency in enumerate(args.concurrency):
            progress("measuring", done, len(args.concurrency))
            levels.append(await load.run(concurrency, args.warmup, args.seconds))
            if levels[-1].given_up:
                break
    return levels


def table(levels: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that people read. levels: as `Level.summary` has them."""
    rows = [["clients", "req/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "errors"]]
    for level in levels:
        taken = (level["latency_ms"][name] for name in ("p50", "p90", "p99", "max"))
        shown = ("-" if figure is None else f"{figure:.2f}" for figure in taken)
        rows.append([str(level["concurrency"]), f"{level['requests_per_second']:.1f}", *shown, str(level["errors"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _write(args: argparse.Namespace, levels: Sequence[dict[str, Any]]) -> None:
    if args.json is not None:
        content = {
            "shardserve": shardserve.__version__,
            "python": platform.python_version(),
            "address": args.address,
            "servable": args.name,
            "method": args.method,
            "version": args.version,
            "instances": args.instances,
            "seconds": args.seconds,
            "warmup": args.warmup,
            "timeout": args.timeout,
            "levels": levels,
        }
        try:
            args.json.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"{args.json}: {error.strerror}") from error
    if args.plot is not None:
        plot.draw(args.plot, f"{args.name}.{args.method} at {args.address}", levels)


def _tell_errors(levels: Sequence[Level]) -> int:
    """The exit code."""
    count = sum(sum(level.errors.values()) for level in levels)
    if not count:
        return 0
    first = next(level.first_error for level in levels if level.first_error)
    print(f"shardserve bench: {count} requests failed, the first: {first}", file=sys.stderr)
    if levels[-1].given_up:
        print(f"shardserve bench: ended early: for {GIVE_UP:g} s nothing could be served", file=sys.stderr)
    return 1
