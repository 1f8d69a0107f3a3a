"""`shardserve serve`: the server of a distributed servable, whose agents are on this or other hosts."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from shardserve.cli.guard import add_guard_arguments, add_tls_arguments, ssl_config
from shardserve.cli.up import only_servable
from shardserve.errors import ShardserveError
from shardserve.log import configure_logging
from shardserve.server import distributed, start_grpc_server, start_restful_server, stop
from shardserve.server.runtime import current_runtime

EXAMPLE = """example, on the host 10.0.0.1, for agents that `shardserve agents` starts on the hosts of the table:
  shardserve serve . --rank-table ranks.json --distributed-address 10.0.0.1:6200 --join-secret-file join.secret
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model whose ranks are on several hosts: the server",
        description="Starts the server of a model whose agents `shardserve agents` starts, on each host of the rank "
        "table, before or after it, and stays in the foreground. Prints one line that begins with 'ready' when the "
        "first request can be answered; SIGINT or SIGTERM ends the server and its agents.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="holds NAME/servable_config.py")
    parser.add_argument("--servable", metavar="NAME", help="default: the only one in DIR")
    parser.add_argument("--rank-table", metavar="FILE", type=Path, required=True, help="which host has which ranks")
    parser.add_argument("--version", type=int, default=1, metavar="N", help="the servable's version (default 1)")
    parser.add_argument(
        "--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT", help="for agents; default %(default)s"
    )
    parser.add_argument(
        "--wait-agents", type=float, default=0, metavar="S", help="seconds until agents that are missing are an error"
    )
    parser.add_argument("--grpc-address", default="127.0.0.1:5500", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--rest-address", default="127.0.0.1:1500", metavar="IP:PORT", help="default %(default)s")
    parser.add_argument(
        "--max-msg-mb-size", type=int, default=100, metavar="N", help="of a request; default %(default)s"
    )
    add_guard_arguments(parser)
    front = parser.add_argument_group("TLS of gRPC and REST")
    add_tls_arguments(front, "front-", "the server's certificate")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logging("serve")
    directory: Path = args.directory.resolve()
    name = args.servable or only_servable(directory)
    guard, front = ssl_config(args), ssl_config(args, "front-")
    try:
        start_grpc_server(args.grpc_address, args.max_msg_mb_size, front)
        start_restful_server(args.rest_address, args.max_msg_mb_size, front)
        distributed.start_servable(
            str(directory),
            name,
            str(args.rank_table.resolve()),
            args.version,
            args.distributed_address,
            args.wait_agents,
            join_secret_file=args.join_secret_file,
            ssl_config=guard,
            insecure=args.insecure,
        )
    except ShardserveError:
        stop()
        raise
    runtime = current_runtime()
    print(f"ready: {name}; gRPC on {args.grpc_address}, REST on {args.rest_address}", flush=True)
    # What a ready server is asked to do by a signal, it has done.
    with contextlib.suppress(SystemExit):
        runtime.join()
    return 0
