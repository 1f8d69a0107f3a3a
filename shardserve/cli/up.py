"""`shardserve up`: server and agents of one host, in the foreground."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
from pathlib import Path

from shardserve.cli.codes import INTERRUPTED
from shardserve.errors import ConfigError, ShardserveError
from shardserve.log import configure_logging
from shardserve.server import distributed, start_grpc_server, start_restful_server, stop
from shardserve.server.runtime import current_runtime
from shardserve.shards.config import CONFIG_FILE, ShardConfig
from shardserve.worker.rank_table import load_rank_table, make_rank_table

EXAMPLE = """example:
  shardserve up examples/matmul_distributed
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "up",
        help="serve a model with all of its ranks on this host",
        description="Starts the server and the agents of all ranks on this host and stays in the foreground. Prints "
        "one line that begins with 'ready' when the first request can be answered; SIGINT or SIGTERM ends all.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="holds NAME/servable_config.py")
    parser.add_argument("--servable", metavar="NAME", help="default: the only one in DIR")
    parser.add_argument("--model-dir", metavar="DIR", type=Path, help="holds device0, device1, … (default: DIR/model)")
    parser.add_argument("--rank-table", metavar="FILE", type=Path, help="default: all ranks on this host")
    parser.add_argument("--version", type=int, default=1, metavar="N", help="the servable's version (default 1)")
    parser.add_argument("--grpc-address", default="127.0.0.1:5500", metavar="IP:PORT", help="default %(default)s")
    parser.add_argument("--rest-address", default="127.0.0.1:1500", metavar="IP:PORT", help="default %(default)s")
    parser.add_argument(
        "--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT", help="default %(default)s"
    )
    parser.add_argument("--agent-start-port", type=int, default=7000, metavar="N", help="default %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logging("up")
    directory: Path = args.directory.resolve()
    name = args.servable or only_servable(directory)
    model_dir: Path = (args.model_dir or directory / "model").resolve()
    shards = _shards(model_dir)
    if args.rank_table is None:
        table = _local_rank_table(len(shards))
        count = len(shards)
    else:
        table = str(args.rank_table.resolve())
        count = _ranks_in(args.rank_table, len(shards))
    # A replica's ranks load the same shards again.
    files = [str(shards[rank % len(shards)]) for rank in range(count)]
    try:
        _start(args, str(directory), name, table, files)
    except ShardserveError:
        stop()
        raise
    except SystemExit:
        # A signal, before anything was ready: what was asked for was not done.
        return INTERRUPTED
    runtime = current_runtime()
    print(f"ready: {name} of {count} ranks; gRPC on {args.grpc_address}, REST on {args.rest_address}", flush=True)
    # What a ready server is asked to do by a signal, it has done.
    with contextlib.suppress(SystemExit):
        runtime.join()
    return 0


def _start(args: argparse.Namespace, directory: str, name: str, table: str, files: list[str]) -> None:
    """Returns when the first request can be answered."""
    start_grpc_server(args.grpc_address)
    start_restful_server(args.rest_address)
    # The port first: agents must not join another server that has it.
    servable = distributed.begin_servable(directory, name, table, args.version, args.distributed_address)
    configs = [str(Path(file).with_name(CONFIG_FILE)) for file in files]
    # Without one of its ranks the only replica can't serve: whoever watches this process should know.
    agents = distributed.begin_agents(
        args.distributed_address, files, configs, args.agent_start_port, vital=len(set(files)) == len(files)
    )
    for done in concurrent.futures.as_completed((servable, agents)):
        done.result()


def only_servable(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob("*/servable_config.py"))
    if len(found) != 1:
        what = f"{len(found)} servables ({', '.join(found)}): say which with --servable" if found else "no servable"
        raise ConfigError(f"{directory}: has {what}; a servable is a folder with a servable_config.py")
    return found[0]


def _shards(model_dir: Path) -> list[Path]:
    """The graph file of each local rank."""
    first = model_dir / "device0" / CONFIG_FILE
    if not first.is_file():
        raise ConfigError(f"there is no {first}: export the model first, or give --model-dir")
    ranks = ShardConfig.load(first).rank_size
    configs = [ShardConfig.load(model_dir / f"device{rank}" / CONFIG_FILE) for rank in range(ranks)]
    return [model_dir / f"device{rank}" / config.graph_file for rank, config in enumerate(configs)]


def _local_rank_table(ranks: int) -> str:
    """A table of all ranks on this host, in memory that goes with this process: nothing is left to clean up."""
    table = make_rank_table([("127.0.0.1", range(ranks))])
    fd = os.memfd_create("rank_table.json")
    os.write(fd, json.dumps(table).encode())
    return f"/proc/{os.getpid()}/fd/{fd}"


def _ranks_in(table: Path, rank_size: int) -> int:
    # Only the count is needed here; the Worker checks the table against the servable's own stage_size.
    return len(load_rank_table(str(table), rank_size, 1).entries)
