"""`shardserve agents`: all agents of this host, for a server on this or another one."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from shardserve.cli.guard import add_guard_arguments, ssl_config
from shardserve.errors import ShardserveError
from shardserve.log import configure_logging
from shardserve.server import distributed, stop
from shardserve.server.runtime import current_runtime

EXAMPLE = """example, on the host of the ranks 2 and 3, for a server that `shardserve serve` started on 10.0.0.1:
  shardserve agents model/device2/net.graph.json model/device3/net.graph.json \\
    --distributed-address 10.0.0.1:6200 --join-secret-file join.secret
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "agents",
        help="serve a model whose ranks are on several hosts: the agents of this host",
        description="Starts the agents of all ranks that the server's rank table has on this host, keeps them "
        "alive and stays in the foreground. Prints one line that begins with 'ready' when all are registered; SIGINT, "
        "SIGTERM or the end of the servable ends them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model_files",
        nargs="+",
        metavar="GRAPH",
        type=Path,
        help="graph files, one per rank of this host, in rank order",
    )
    parser.add_argument(
        "--group-config", nargs="+", metavar="FILE", type=Path, help="default: the group_config.json beside each GRAPH"
    )
    parser.add_argument(
        "--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT", help="the server's; default %(default)s"
    )
    parser.add_argument(
        "--agent-start-port", type=int, default=7000, metavar="N", help="agent i listens on N + i; default %(default)s"
    )
    parser.add_argument(
        "--agent-ip", metavar="IP", help="this host's address, if the rank table has another one; with --rank-start"
    )
    parser.add_argument("--rank-start", type=int, metavar="N", help="this host's first rank; with --agent-ip")
    parser.add_argument("--device-type", choices=("cpu", "cuda"), help="default: cpu")
    add_guard_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logging("agents")
    configs = [str(path.resolve()) for path in args.group_config] if args.group_config is not None else None
    guard = ssl_config(args)
    try:
        distributed.startup_agents(
            args.distributed_address,
            [str(path.resolve()) for path in args.model_files],
            configs,
            args.agent_start_port,
            args.agent_ip,
            args.rank_start,
            args.device_type,
            join_secret_file=args.join_secret_file,
            ssl_config=guard,
            insecure=args.insecure,
        )
    except ShardserveError:
        stop()
        raise
    runtime = current_runtime()
    print(f"ready: {len(args.model_files)} agents of the server at {args.distributed_address}", flush=True)
    # What a ready server is asked to do by a signal, it has done.
    with contextlib.suppress(SystemExit):
        runtime.join()
    return 0
