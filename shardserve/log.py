"""Logging of our own processes; in a script, our loggers have a handler until the script configures logging."""

from __future__ import annotations

import logging
import sys
from typing import Any

from shardserve.errors import shortened
from shardserve.settings import Settings

FORMAT = "%(asctime)s %(levelname)s {}[%(process)d] %(message)s"
MAX_LOGGED = 16_000
"""Characters of a message, and of a traceback: what a servable's own code raises may have any length."""


class Lines(logging.Formatter):
    """Time, level, process, message and traceback, these two with an end. servable: before each message, if any."""

    servable = ""

    def __init__(self, process: str) -> None:
        super().__init__(FORMAT.format(process))

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shortened(record.message, MAX_LOGGED)
        if self.servable:
            record.message = f"{self.servable}: {record.message}"
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return shortened(super().formatException(ei), MAX_LOGGED)


def log_in_scripts() -> None:
    """Our warnings in a process that configures no logging: the same lines, where Python would print the bare text."""
    ours = logging.getLogger("shardserve")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        # Silent as soon as the script has handlers of its own.
        handler.addFilter(lambda _: not logging.getLogger().handlers)
        handler.setFormatter(Lines("script"))
        ours.addHandler(handler)


def configure_logging(process: str) -> None:
    """Lines on stderr: time, level, process. The level is the setting log_level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(process))
    logging.basicConfig(level=Settings.from_environment().log_level, handlers=[handler])


def servable_in_words(name: str, version: int) -> str:
    """As every line begins that is about one of several servables."""
    return f"servable {name!r} version {version}"


def work_for(servable: str) -> None:
    """Has each line of this process, which works for this servable alone, begin with it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, Lines):
            handler.formatter.servable = servable
