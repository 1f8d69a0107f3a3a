"""Logging of our own processes; as a library, shardserve logs to its named loggers and configures nothing."""

from __future__ import annotations

import logging
import os
import sys


def configure_logging(process: str) -> None:
    """Lines on stderr: time, level, process. The level is that of SHARDSERVE_LOG_LEVEL, WARNING if unset."""
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("SHARDSERVE_LOG_LEVEL", "WARNING").upper(),
        format=f"%(asctime)s %(levelname)s {process}[%(process)d] %(message)s",
    )
