"""What `up`, `serve` and `agents` do alike: find the servable, start, say that it is ready, and stay until a signal."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from shardserve.cli.codes import INTERRUPTED, WrongUsage
from shardserve.cli.options import values
from shardserve.cli.options.guard import ssl_config
from shardserve.cli.progress import shown_progress
from shardserve.errors import ConfigError, ShardserveError
from shardserve.log import configure_logging
from shardserve.progress import Progress
from shardserve.server import ServableStartConfig, start_grpc_server, start_restful_server, stop
from shardserve.server.runtime import join
from shardserve.server.servables import start_and_tell

# In DIR: where the shards of a distributed servable are, unless --model-dir says otherwise.
MODEL_FOLDER = "model"


def in_foreground(name: str, start: Callable[[Progress], str]) -> int:
    """Runs `start`, prints "ready: " and what it returns, and stays until all has ended; the exit code."""
    configure_logging(name)
    ready = False
    try:
        with shown_progress() as progress:
            line = start(progress)
        # Before the line is printed: who reads it may send the signal at once.
        ready = True
        print(f"ready: {line}", flush=True)
    except (ShardserveError, OSError):
        # Also where the line can't be written: whoever waits for it would wait for ever. A signal meanwhile asks for
        # what is being done, and what went wrong is told all the same.
        with contextlib.suppress(SystemExit):
            stop()
        raise
    except SystemExit:
        if not ready:
            # A signal before it was ready: what was asked for was not done.
            return INTERRUPTED
    # A ready server that a signal ends has done what it was asked for: exit code 0.
    with contextlib.suppress(SystemExit):
        join()
    return 0


def start_fronts(args: argparse.Namespace) -> None:
    front = ssl_config(args, "front-")
    start_grpc_server(args.grpc_address, args.max_msg_mb_size, front)
    start_restful_server(args.rest_address, args.max_msg_mb_size, front)


def start_local(args: argparse.Namespace, name: str, progress: Progress) -> str:
    """Starts a servable that is not distributed, with a replica on each of --devices; what is ready."""
    start_fronts(args)
    devices = args.devices or [0]
    config = ServableStartConfig(
        str(args.directory), name, devices, args.version or 0, args.device_type, args.num_parallel_workers
    )
    start_and_tell(config, progress)
    return f"{name} on {values.counted(len(devices), 'device')}; {fronts(args)}"


def fronts(args: argparse.Namespace) -> str:
    return f"gRPC on {args.grpc_address}, REST on {args.rest_address}"


def servable_name(args: argparse.Namespace) -> str:
    """--servable, else the only one in DIR. ConfigError if there are several or none."""
    directory: Path = args.directory
    if args.servable is not None:
        return str(args.servable)
    if not directory.is_dir():
        raise ConfigError(f"there is no directory {directory}")
    found = sorted(path.parent.name for path in directory.glob("*/servable_config.py"))
    if len(found) > 1:
        raise ConfigError(f"{directory}: has {len(found)} servables ({', '.join(found)}): say which with --servable")
    if not found:
        raise ConfigError(f"{directory}: has no servable; a servable is a folder with a servable_config.py")
    return found[0]


def is_local(args: argparse.Namespace, name: str, distributed: dict[str, object]) -> bool:
    """Whether the servable is one that is not distributed: --devices says so, or its folder of a version does where
    nothing speaks for the other kind, whose options are `distributed` (name → value). WrongUsage for both of them,
    ConfigError for --devices where only shards of ranks are found."""
    given = [option for option, value in distributed.items() if value is not None]
    if args.devices is not None and given:
        raise WrongUsage(f"--devices is for a servable that is not distributed, {given[0]} for one that is")
    if given:
        return False
    versions = (args.directory / name).glob("[1-9]*")
    has_version = any(path.is_dir() and path.name.isdecimal() for path in versions)
    distributed_model = args.directory / MODEL_FOLDER
    if args.devices is None:
        return has_version and not distributed_model.is_dir()
    if not has_version and distributed_model.is_dir():
        raise ConfigError(
            f"--devices is for a servable that is not distributed; {name!r} has its ranks' shards in "
            f"{distributed_model}, and no folder of a version, such as {args.directory / name / '1'}"
        )
    return True
