"""The `shardserve` command. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import shardserve
from shardserve.cli import agents, export, infer, inspect, rank_table, serve, status, up
from shardserve.cli.codes import INTERRUPTED, WrongUsage
from shardserve.errors import ShardserveError


def parser() -> argparse.ArgumentParser:
    """Of the whole command, with all of its subcommands."""
    top = argparse.ArgumentParser(prog="shardserve", description=shardserve.__doc__)
    top.add_argument("--version", action="version", version=f"shardserve {shardserve.__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in (export, inspect, rank_table, up, serve, agents, status, infer):
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what goes wrong is one line on stderr."""
    top = parser()
    # Completion is an extra; without it the shell completes file names.
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(top)
    args = top.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except WrongUsage as error:
        print(f"shardserve {args.command}: error: {error}; see shardserve {args.command} --help", file=sys.stderr)
        return 2
    except ShardserveError as error:
        print(f"shardserve {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"shardserve {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough of it; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
