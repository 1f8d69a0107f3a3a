"""Logging of our own processes; as a library, shardserve logs to its named loggers and configures nothing."""

from __future__ import annotations

import logging
import sys

from shardserve.settings import Settings


def configure_logging(process: str) -> None:
    """Lines on stderr: time, level, process. The level is the setting log_level."""
    logging.basicConfig(
        stream=sys.stderr,
        level=Settings.from_environment().log_level,
        format=f"%(asctime)s %(levelname)s {process}[%(process)d] %(message)s",
    )
