"""Logging of our own processes; in a script, our loggers have a handler until the script configures logging."""

from __future__ import annotations

import logging
import sys

from shardserve.settings import Settings

FORMAT = "%(asctime)s %(levelname)s {}[%(process)d] %(message)s"


def log_in_scripts() -> None:
    """Our warnings in a process that configures no logging: the same lines, where Python would print the bare text."""
    ours = logging.getLogger("shardserve")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        # Silent as soon as the script has handlers of its own.
        handler.addFilter(lambda _: not logging.getLogger().handlers)
        handler.setFormatter(logging.Formatter(FORMAT.format("script")))
        ours.addHandler(handler)


def configure_logging(process: str) -> None:
    """Lines on stderr: time, level, process. The level is the setting log_level."""
    logging.basicConfig(
        stream=sys.stderr,
        level=Settings.from_environment().log_level,
        format=FORMAT.format(process),
    )
