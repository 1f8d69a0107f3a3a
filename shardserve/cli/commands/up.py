"""`shardserve up`: server and agents of one host, in the foreground."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
from pathlib import Path

from shardserve.cli.options import values
from shardserve.cli.options.guard import add_guard_arguments, check_guarded, join_secret_file, ssl_config
from shardserve.cli.options.server import (
    add_agent_arguments,
    add_device_arguments,
    add_distributed_address,
    add_front_arguments,
    add_servable_arguments,
)
from shardserve.cli.serving import (
    MODEL_FOLDER,
    fronts,
    in_foreground,
    is_local,
    servable_name,
    start_fronts,
    start_local,
)
from shardserve.errors import ConfigError, RankTableError
from shardserve.progress import Progress
from shardserve.server import distributed
from shardserve.shards.config import CONFIG_FILE, ShardConfig
from shardserve.wire.sockets import is_local as is_local_host
from shardserve.worker.rank_table import load_rank_table, make_rank_table

EXAMPLE = """The model of a servable that is not distributed (declare_model) is in DIR/NAME/VERSION, such as DIR/NAME/1.

examples:
  shardserve up examples/matmul_distributed
  shardserve up . --model-dir model/read --model-dir model/step     # two subgraphs of each rank
  shardserve up . --servable mlp --devices 0,1                      # not distributed: a replica on each device
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "up",
        help="serve a model with all of its ranks on this host",
        description="Starts the server and the agents of all ranks on this host and stays in the foreground. Prints "
        "one line that begins with 'ready' when the first request can be answered; SIGINT or SIGTERM ends all.",
        epilog=EXAMPLE,
    )
    add_servable_arguments(parser)
    ranks = parser.add_argument_group("its ranks")
    ranks.add_argument(
        "--model-dir",
        action="append",
        type=values.path,
        metavar="DIR",
        help="holds device0, device1, …; once per subgraph, in their order (default: DIR/model)",
    )
    ranks.add_argument(
        "--rank-table", type=values.path, metavar="FILE", help="which device has which rank (default: one is made)"
    )
    add_agent_arguments(ranks)
    add_device_arguments(ranks)
    add_distributed_address(ranks, "what the agents connect to")
    add_front_arguments(parser)
    add_guard_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name = servable_name(args)
    if is_local(args, name, {"--model-dir": args.model_dir, "--rank-table": args.rank_table}):
        return in_foreground("up", lambda progress: start_local(args, name, progress))
    check_guarded(args)
    shards = _shards(args.model_dir or [args.directory / MODEL_FOLDER], args.directory / name)
    return in_foreground("up", lambda progress: _start(args, name, shards, progress))


def _start(args: argparse.Namespace, name: str, shards: list[list[str]], progress: Progress) -> str:
    """Returns when the first request can be answered."""
    if args.rank_table is None:
        table, count = _local_rank_table(len(shards)), len(shards)
    else:
        # Only the count is needed here; the Worker checks the table against the servable's own stage_size.
        table = str(args.rank_table)
        known = load_rank_table(table, len(shards), 1)
        count = len(known.entries)
        if foreign := [host for host in known.hosts if not is_local_host(host)]:
            raise ConfigError(
                f"rank table {table}: {', '.join(foreign)} is no address of this host, where `up` starts all; for "
                "several hosts there are `shardserve serve` and `shardserve agents`"
            )
    # A replica's ranks load the same shards again.
    files = [shards[rank % len(shards)] for rank in range(count)]
    guard = {
        "join_secret_file": join_secret_file(args),
        "ssl_config": ssl_config(args),
        "insecure": args.insecure,
    }
    start_fronts(args)
    # The port first: agents must not join another server that has it.
    servable = distributed.begin_servable(
        str(args.directory),
        name,
        table,
        args.version or 1,
        args.distributed_address,
        **guard,
        num_parallel_workers=args.num_parallel_workers,
        own_agents=True,
        progress=progress,
    )
    # Without one of its ranks the only replica can't serve: whoever watches this process should know.
    agents = distributed.begin_agents(
        args.distributed_address,
        files,
        agent_start_port=args.agent_start_port,
        device_type=args.device_type,
        **guard,
        vital=count == len(shards),
        with_server=True,
        progress=progress,
    )
    try:
        for done in concurrent.futures.as_completed((servable, agents)):
            done.result()
    except RankTableError as error:
        if args.rank_table is not None:
            raise
        # A table that the user has never seen was made of the shards.
        raise ConfigError(str(error).replace(f"rank table {table}: $", f"the model in {_folders(shards)}")) from error
    what = f"{name} of {values.counted(count, 'rank')}; {fronts(args)}"
    return f"{what}; {agents.result()}" if agents.result() else what


def _folders(shards: list[list[str]]) -> str:
    return ", ".join(str(Path(graph).parent.parent) for graph in shards[0])


def _shards(model_dirs: list[Path], servable: Path) -> list[list[str]]:
    """The graph files of each local rank, one per subgraph."""
    subgraphs = [_graphs(model_dir, servable) for model_dir in model_dirs]
    for model_dir, graphs in zip(model_dirs, subgraphs, strict=True):
        if len(graphs) != len(subgraphs[0]):
            raise ConfigError(
                f"{model_dirs[0]} has {values.counted(len(subgraphs[0]), 'rank')}, {model_dir} has {len(graphs)}"
            )
    return [list(graphs) for graphs in zip(*subgraphs, strict=True)]


def _graphs(model_dir: Path, servable: Path) -> list[str]:
    first = model_dir / "device0" / CONFIG_FILE
    if not first.is_file():
        raise ConfigError(
            f"there is no {first}: export the model first, or give --model-dir; if the servable is not distributed, "
            f"export it to {servable / '1'}"
        )
    ranks = ShardConfig.load(first).rank_size
    folders = [model_dir / f"device{rank}" for rank in range(ranks)]
    return [str(folder / ShardConfig.load(folder / CONFIG_FILE).graph_file) for folder in folders]


def _local_rank_table(ranks: int) -> str:
    """A table of all ranks on this host, in memory that goes with this process: nothing is left to clean up."""
    table = make_rank_table([("127.0.0.1", range(ranks))])
    fd = os.memfd_create("rank_table.json")
    os.write(fd, json.dumps(table).encode())
    return f"/proc/{os.getpid()}/fd/{fd}"
