"""The `shardserve` command: its entry, which imports nothing large before it has seen to Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

from shardserve.cli.codes import INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what goes wrong is one line on stderr."""
    # An import that is cut short raises anything, or goes on without what it was to bring.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, _interrupted)
    from shardserve.cli import commands

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return commands.run(argv)


def _interrupted(number: int, frame: object) -> None:
    """Nothing has been started yet that would have to be ended."""
    os.write(2, b"shardserve: interrupted\n")
    os._exit(INTERRUPTED)
