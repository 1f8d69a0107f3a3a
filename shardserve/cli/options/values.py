"""The types of the commands' arguments; what isn't of its type is wrong usage, told with the option's name.

Paths become absolute: the launch API takes relative ones from its script's folder, a command from the current one.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from shardserve.errors import ConfigError
from shardserve.shards.expressions import is_name
from shardserve.wire.sockets import parse_address

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)\Z", re.ASCII)
_UNITS = {unit: 1024**power for power, unit in enumerate(("", "kib", "mib", "gib", "tib"))}
_UNITS |= {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
HIGHEST_PORT = 65535
# More than any host has; so that a slip of the finger doesn't run for ever.
HIGHEST_DEVICE = 65535


def counted(count: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {what}{'s' * (count != 1)}"


def path(text: str) -> Path:
    """A path from the current directory, absolute."""
    return Path(text).expanduser().absolute()


def _digits(text: str) -> bool:
    # No longer than a 64-bit integer: Python refuses to convert thousands of digits.
    return text.isascii() and text.isdecimal() and len(text) <= 20


def count(text: str) -> int:
    """1 or more."""
    if not _digits(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 1 or more")
    return int(text)


def number(text: str) -> int:
    """0 or more."""
    if not _digits(text):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return int(text)


def port(text: str) -> int:
    if not _digits(text) or not 0 < int(text) <= HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a port of 1 to {HIGHEST_PORT}")
    return int(text)


def megabytes(text: str) -> int:
    if not _digits(text) or not 1 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 1 to 512")
    return int(text)


def count_or_auto(text: str) -> int | None:
    """1 or more; None for auto."""
    return None if text == "auto" else count(text)


def memory(text: str) -> int:
    """Bytes, as 16GiB or 500MB."""
    match = _SIZE.match(text)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a size as 16GiB, 500MB or 1000")
    return size


def not_negative(text: str) -> float:
    """A finite number of 0 or more: seconds, tolerances."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return value


def address(text: str) -> str:
    """`ip:port`."""
    try:
        parse_address(text, "")
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r} isn't ip:port with a port of 1 to {HIGHEST_PORT}") from None
    return text


def grpc_address(text: str) -> str:
    """`ip:port` or `unix:path`."""
    if not text.startswith("unix:"):
        return address(text)
    if text == "unix:":
        raise argparse.ArgumentTypeError(f"{text!r} has no path")
    return f"unix:{path(text.removeprefix('unix:'))}"


def server_address(text: str) -> str:
    """`host:port` or `unix:path`: of a server that there is."""
    try:
        return grpc_address(text)
    except argparse.ArgumentTypeError as error:
        if text.startswith("unix:"):
            raise
        said = f"{text!r} isn't host:port with a port of 1 to {HIGHEST_PORT}, and not unix:path"
        raise argparse.ArgumentTypeError(said) from error


def dims(text: str) -> dict[str, int]:
    """Sizes of dims: `batch=8,length=128`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not is_name(name) or not _digits(size):
            raise argparse.ArgumentTypeError(f"{part!r} isn't NAME=SIZE")
        if name in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} has the dim {name} twice")
        sizes[name] = int(size)
    return sizes


def device_count(text: str) -> int:
    """How many devices a host has."""
    if not _digits(text) or not 1 <= int(text) <= HIGHEST_DEVICE + 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of devices, 1 to {HIGHEST_DEVICE + 1}")
    return int(text)


def device_ids(text: str) -> list[int]:
    """Device ids with commas and ranges: `0,2-4`."""
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _digits(first) or (dash and not _digits(last)) or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{part!r} is no device id and no range of them")
        if int(last or first) > HIGHEST_DEVICE:
            raise argparse.ArgumentTypeError(f"{part!r}: the highest device id is {HIGHEST_DEVICE}")
        ids += range(int(first), int(last or first) + 1)
    if len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} has a device twice")
    return ids


def check_folder(file: Path) -> None:
    """ConfigError if a file can't be there; told before the work whose result it is to hold."""
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no directory {file.parent}")
    if file.is_dir():
        raise ConfigError(f"{file} is a directory")
