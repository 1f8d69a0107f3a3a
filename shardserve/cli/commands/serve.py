"""`shardserve serve`: the server of a distributed servable, whose agents are on this or other hosts."""

from __future__ import annotations

import argparse

from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.cli.options.guard import add_guard_arguments, check_guarded, join_secret_file, ssl_config
from shardserve.cli.options.server import (
    add_device_arguments,
    add_device_type,
    add_distributed_address,
    add_front_arguments,
    add_servable_arguments,
)
from shardserve.cli.serving import fronts, in_foreground, is_local, servable_name, start_fronts, start_local
from shardserve.errors import ConfigError
from shardserve.progress import Progress
from shardserve.server import distributed

EXAMPLE = """example, on the host 10.0.0.1, for agents that `shardserve agents` starts on the hosts of the table:
  shardserve serve . --rank-table ranks.json --distributed-address 10.0.0.1:6200 --join-secret-file join.secret
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model whose ranks are on several hosts: the server",
        description="Starts the server of a model whose agents `shardserve agents` starts, on each host of the rank "
        "table, before or after it, and stays in the foreground. Prints one line that begins with 'ready' when the "
        "first request can be answered; SIGINT or SIGTERM ends the server and its agents. A servable that is not "
        "distributed needs no agents: it gets replicas on this host's --devices.",
        epilog=EXAMPLE,
    )
    add_servable_arguments(parser)
    ranks = parser.add_argument_group("its ranks")
    ranks.add_argument(
        "--rank-table",
        type=values.path,
        metavar="FILE",
        help="which host has which ranks (no default: needed unless the servable is not distributed)",
    )
    add_distributed_address(ranks, "where agents come")
    ranks.add_argument(
        "--wait-agents",
        type=values.not_negative,
        default=0,
        metavar="S",
        help="seconds until agents that are missing are an error (default: 0, which waits for ever)",
    )
    add_device_arguments(ranks)
    add_device_type(ranks)
    add_front_arguments(parser)
    add_guard_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name = servable_name(args)
    if is_local(args, name, {"--rank-table": args.rank_table}):
        return in_foreground("serve", lambda progress: start_local(args, name, progress))
    if args.rank_table is None:
        # Wrong usage is what is wrong whatever the files say.
        raise ConfigError(
            f"servable {name!r} is distributed: give its --rank-table; one that is not has a folder of a version, such "
            f"as {args.directory / name / '1'}"
        )
    if args.device_type is not None:
        raise WrongUsage(
            "--device-type: what the ranks run on is said to their agents: shardserve agents --device-type"
        )
    check_guarded(args)
    return in_foreground("serve", lambda progress: _start(args, name, progress))


def _start(args: argparse.Namespace, name: str, progress: Progress) -> str:
    guard = ssl_config(args)
    start_fronts(args)
    distributed.begin_servable(
        str(args.directory),
        name,
        str(args.rank_table),
        args.version or 1,
        args.distributed_address,
        args.wait_agents,
        join_secret_file=join_secret_file(args),
        ssl_config=guard,
        insecure=args.insecure,
        num_parallel_workers=args.num_parallel_workers,
        progress=progress,
    ).result()
    return f"{name}; {fronts(args)}"
