"""`shardserve infer`: one request with inputs from .npy files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shardserve.cli.status import add_address_argument, add_connection_arguments, tls_config
from shardserve.client import Client
from shardserve.client.codec import MAX_VERSION
from shardserve.errors import ConfigError, InvalidInput, ShardserveError

EXAMPLE = """example:
  shardserve infer 127.0.0.1:5500 matmul predict --input x=x.npy --output-dir results
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "infer",
        help="call a method of a running server with inputs from .npy files",
        description="Calls a method of a running server once, with inputs from .npy files, and prints the outputs.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_address_argument(parser)
    parser.add_argument("name", metavar="NAME", help="the servable")
    parser.add_argument("method", metavar="METHOD", help="the method")
    parser.add_argument(
        "--version", type=_version, default=0, metavar="N", help="the servable's version (default: the latest)"
    )
    parser.add_argument(
        "--input",
        action=_Inputs,
        default={},
        type=_input,
        metavar="NAME=FILE.npy",
        help="an input of the method; once per input",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="write each output to DIR/NAME.npy as well (default: only print)"
    )
    add_connection_arguments(parser, timeout=None)
    parser.set_defaults(run=run)


class _Inputs(argparse.Action):
    """Collects name → file; a name given twice is wrong usage."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, path = values
        given: dict[str, Path] = getattr(namespace, self.dest)
        if name in given:
            raise argparse.ArgumentError(self, f"the input {name!r} is given twice: {given[name]} and {path}")
        setattr(namespace, self.dest, {**given, name: path})


def _version(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_VERSION:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number from 0 (the latest) to {MAX_VERSION}")
    return int(text)


def _input(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} isn't NAME=FILE.npy")
    return name, Path(path)


def run(args: argparse.Namespace) -> int:
    try:
        instance = {name: _load(name, path) for name, path in args.input.items()}
        config = tls_config(args)
        with Client(args.address, args.name, args.method, args.version, config, raise_errors=True) as client:
            outputs = client.infer(instance, args.timeout)
        assert isinstance(outputs, list)
        for name, value in outputs[0].items():
            _show(name, value)
            if args.output_dir is not None:
                _save(args.output_dir / f"{name}.npy", value)
    except ShardserveError as error:
        print(f"shardserve infer: {args.address}: {error}", file=sys.stderr)
        return 1
    return 0


def _load(name: str, path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(f"input {name!r}: {path}: {error}") from error


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
