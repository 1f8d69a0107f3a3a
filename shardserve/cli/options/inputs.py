"""The options of commands that call a method: which method, and its inputs from .npy files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from shardserve.client.codec import MAX_VERSION
from shardserve.errors import InvalidInput

UNREADABLE = (OSError, ValueError, EOFError, BadZipFile)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, METHOD and --version."""
    parser.add_argument("name", metavar="NAME", help="the servable")
    parser.add_argument("method", metavar="METHOD", help="the method")
    add_version_argument(parser)


def add_version_argument(parser: argparse.ArgumentParser, what: str = "the servable's version") -> None:
    parser.add_argument("--version", type=_version, default=0, metavar="N", help=f"{what} (default: the latest)")


def add_input_argument(parser: argparse.ArgumentParser) -> None:
    """--input, once per input: `args.input` has name → file."""
    parser.add_argument(
        "--input",
        action=_Inputs,
        default={},
        type=_input,
        metavar="NAME=FILE.npy",
        help="an input of the method; once per input",
    )


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


def load_instance(files: dict[str, Path]) -> dict[str, Any]:
    """One instance of the inputs that --input gives. InvalidInput names the input and the file that can't be read."""
    return {name: _load(name, path) for name, path in files.items()}


def _load(name: str, path: Path) -> Any:
    found = _read(path, f"input {name!r}: ")
    if isinstance(found, NpzFile):
        found.close()
        raise InvalidInput(f"input {name!r}: {path} has several arrays, each of which is an input (.npz)")
    return found


def load_arrays(path: Path) -> dict[str, Any]:
    """One instance: the arrays of a .npz file, by their names. InvalidInput names the file that can't be read."""
    found = _read(path, "")
    if not isinstance(found, NpzFile):
        raise InvalidInput(f"{path} has one array without a name (.npy)")
    with found:
        try:
            return {name: found[name] for name in found.files}
        except UNREADABLE as error:
            raise InvalidInput(f"{path}: {error}") from error


def _read(path: Path, what: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise InvalidInput(f"{what}{path}: {error.strerror or error}") from error
    except UNREADABLE as error:
        # numpy takes whatever isn't its own for a pickle, and says how to load that: pickles run code.
        said = "is no .npy or .npz file, or holds Python objects" if "allow_pickle" in str(error) else f": {error}"
        raise InvalidInput(f"{what}{path}{' ' * (said[0] != ':')}{said}") from error
