"""Paths of a serving script: relative ones resolve against the directory of the running script."""

from __future__ import annotations

import sys
from pathlib import Path


def resolve(path: str) -> str:
    """An absolute path; `sys.argv[0]` is the running script, the current directory stands in where there is none."""
    script = sys.argv[0] if sys.argv else ""
    base = Path(script).resolve().parent if script and Path(script).is_file() else Path.cwd()
    return str(base / Path(path).expanduser())
