"""All commands, and how one is run. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence

import shardserve
from shardserve.cli.codes import INTERRUPTED, WrongUsage
from shardserve.cli.commands import agents, bench, export, infer, inspect, rank_table, serve, status, trace, up
from shardserve.errors import ShardserveError

_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def parser() -> argparse.ArgumentParser:
    """Of the whole command, with all of its subcommands."""
    top = argparse.ArgumentParser(prog="shardserve", description=shardserve.__doc__)
    top.add_argument("--version", action="version", version=f"shardserve {shardserve.__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in (export, inspect, rank_table, up, serve, agents, status, infer, bench, trace):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.formatter_class = _Formatter
    return top


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs, leaves lines that are examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what goes wrong is one line on stderr."""
    top = parser()
    # Completion is an extra; without it the shell completes file names.
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(top)
    called = "shardserve"
    try:
        try:
            args = top.parse_args(argv)
        except SystemExit:
            # --help and --version: what they print may have nowhere to go, too.
            _flush()
            raise
        called = f"shardserve {args.command}"
        if sys.stdout is None:
            # The next file that is opened would get its number, and with it what children print.
            return _failed(called, "standard output is closed")
        code: int = args.run(args)
        _flush()
    except WrongUsage as error:
        print(f"{called}: error: {error}; see {called} --help", file=sys.stderr)
        return 2
    except ShardserveError as error:
        return _failed(called, str(error))
    except KeyboardInterrupt:
        print(f"{called}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Only an error in writing to an open stream has no file name; any other OSError is a bug.
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        # Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Whoever reads a pipe has enough of it when it closes it.
        return 1 if isinstance(error, BrokenPipeError) else _failed(called, f"can't write its output: {error.strerror}")
    return code


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _failed(called: str, why: str) -> int:
    print(f"{called}: {why}", file=sys.stderr)
    return 1
