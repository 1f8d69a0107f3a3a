"""`shardserve infer`: one request with inputs from .npy files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shardserve.cli.options import inputs
from shardserve.cli.options.client import add_address_argument, add_connection_arguments, tls_config
from shardserve.client import Client
from shardserve.errors import ConfigError, ShardserveError

EXAMPLE = """example:
  shardserve infer 127.0.0.1:5500 matmul predict --input x=x.npy --output-dir results
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "infer",
        help="call a method of a running server with inputs from .npy files",
        description="Calls a method of a running server once, with inputs from .npy files, and prints the outputs.",
        epilog=EXAMPLE,
    )
    add_address_argument(parser)
    inputs.add_method_arguments(parser)
    inputs.add_input_argument(parser)
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="write each output to DIR/NAME.npy as well (default: only print)"
    )
    add_connection_arguments(parser, timeout=None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # What is wrong with files here isn't the server's.
    instance = inputs.load_instance(args.input)
    if args.output_dir is not None:
        _check_output_dir(args.output_dir)
    config = tls_config(args)
    try:
        with Client(args.address, args.name, args.method, args.version, config, raise_errors=True) as client:
            outputs = client.infer(instance, args.timeout)
    except ShardserveError as error:
        print(f"shardserve infer: {args.address}: {error}", file=sys.stderr)
        return 1
    assert isinstance(outputs, list)
    for name, value in outputs[0].items():
        _show(name, value)
        if args.output_dir is not None:
            _save(args.output_dir / f"{name}.npy", value)
    return 0


def _check_output_dir(folder: Path) -> None:
    """ConfigError, before the request is sent, if nothing can be written below it."""
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists():
            raise ConfigError(f"--output-dir: {path} is a file, not a directory")


def _show(name: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        print(f"{name}: {value.dtype} {list(value.shape)}\n{value}")
    else:
        print(f"{name}: {value!r}")


def _save(path: Path, value: Any) -> None:
    """As .npy, without pickle: strings as numpy's own, bfloat16 as float32, which .npy doesn't know."""
    array = np.asarray(value)
    if array.dtype == object:
        array = np.array(array.tolist())
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
