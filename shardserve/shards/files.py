"""Reads the files of a shard without trusting them: whatever is wrong is a ShardError that names the file. No torch."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from shardserve.errors import ShardError

# Many times what an exporter writes: a graph has about 250 bytes a node, a config 100 a tensor.
CONFIG_LIMIT = 16 << 20
GRAPH_LIMIT = 64 << 20


HIDDEN = ".export-"
"""What the name of the folder begins with that an export is written into until it is whole, in the export's own."""
OLD = "old"
"""In there: the device folders that it has replaced, until the last of its own is in place."""


def open_regular(path: str | Path) -> FileIO:
    """The file, open to be read, unbuffered; a link is followed. A pipe or a device would never end, or never begin."""
    try:
        # Opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise ShardError(f"{path}: {'Is a directory' if stat.S_ISDIR(kind) else 'is not a regular file'}")
    return FileIO(descriptor)


def read(path: str | Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    content = b""
    with open_regular(path) as file:
        try:
            while len(content) <= limit and (piece := file.read(limit + 1 - len(content))):
                content += piece
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}") from error
    if len(content) > limit:
        raise ShardError(f"{path}: is larger than {limit >> 20} MiB, the limit for such a file")
    return content


def decode_json(content: bytes, source: str) -> Any:
    """What is written in JSON; ShardError begins with `source`."""
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{source}: not JSON: {error}") from error
    except RecursionError as error:
        raise ShardError(f"{source}: not a shard's JSON: nested too deeply") from error
