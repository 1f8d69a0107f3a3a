"""`shardserve agents`: all agents of this host, for a server on this or another one."""

from __future__ import annotations

import argparse
from pathlib import Path

from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.cli.options.guard import add_guard_arguments, check_guarded, join_secret_file, ssl_config
from shardserve.cli.options.server import add_agent_arguments, add_distributed_address
from shardserve.cli.serving import in_foreground
from shardserve.progress import Progress
from shardserve.server import distributed

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
    )
    parser.add_argument(
        "model_files",
        nargs="+",
        metavar="GRAPH",
        type=values.path,
        help="graph files, one per rank of this host, in rank order",
    )
    parser.add_argument(
        "--subgraph",
        nargs="+",
        action="append",
        default=[],
        metavar="GRAPH",
        type=values.path,
        help="those of the next subgraph, one per rank in the same order; once per further subgraph (default: none)",
    )
    parser.add_argument(
        "--group-config",
        nargs="+",
        action="append",
        metavar="FILE",
        type=values.path,
        help="configs of the GRAPHs, one per rank, and again for each --subgraph (default: the group_config.json "
        "beside each)",
    )
    add_distributed_address(parser, "the server's")
    add_agent_arguments(parser)
    parser.add_argument(
        "--agent-ip",
        metavar="IP",
        help="this host's address, if the rank table has another one; with --rank-start (default: as in the table)",
    )
    parser.add_argument(
        "--rank-start",
        type=values.number,
        metavar="N",
        help="this host's first rank; with --agent-ip (default: as in the table)",
    )
    add_guard_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    graphs = _by_rank("--subgraph", [args.model_files, *args.subgraph], len(args.model_files))
    configs = None
    if args.group_config is not None:
        if len(args.group_config) != 1 + len(args.subgraph):
            raise WrongUsage(f"--group-config: {len(args.group_config)} times for {1 + len(args.subgraph)} subgraphs")
        configs = _by_rank("--group-config", args.group_config, len(args.model_files))
    if (args.agent_ip is None) != (args.rank_start is None):
        raise WrongUsage("--agent-ip and --rank-start: give both or neither")
    check_guarded(args)
    return in_foreground("agents", lambda progress: _start(args, graphs, configs, progress))


def _by_rank(option: str, subgraphs: list[list[Path]], ranks: int) -> list[list[str]]:
    """For each rank the files of all its subgraphs."""
    for files in subgraphs:
        if len(files) != ranks:
            raise WrongUsage(f"{option}: {len(files)} files for {ranks} ranks")
    return [[str(file) for file in files] for files in zip(*subgraphs, strict=True)]


def _start(
    args: argparse.Namespace, graphs: list[list[str]], configs: list[list[str]] | None, progress: Progress
) -> str:
    loaded = distributed.begin_agents(
        distributed_address=args.distributed_address,
        model_files=graphs,
        group_config_files=configs,
        agent_start_port=args.agent_start_port,
        agent_ip=args.agent_ip,
        rank_start=args.rank_start,
        device_type=args.device_type,
        join_secret_file=join_secret_file(args),
        ssl_config=ssl_config(args),
        insecure=args.insecure,
        progress=progress,
    ).result()
    what = f"{values.counted(len(graphs), 'agent')} of the server at {args.distributed_address}"
    return f"{what}; {loaded}" if loaded else what
