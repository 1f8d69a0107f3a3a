"""Checks of the launch API's arguments: ConfigError names the argument and what it was given."""

from __future__ import annotations

import math
import socket
from typing import TypeGuard, TypeVar

from shardserve.errors import ConfigError
from shardserve.wire.sockets import Address, parse_address

T = TypeVar("T")

# A version is an unsigned 64-bit number in the protocol.
LAST_VERSION = 2**64 - 1


def check_path(name: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{name}={value!r} is not a path, as a str")
    return value


def check_optional_path(name: str, value: object) -> str | None:
    return None if value is None else check_path(name, value)


def check_servable_name(name: str, value: object) -> str:
    """That of a folder: it is found by it, and part of a REST path."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        raise ConfigError(f"{name}={value!r} is not the name of a servable's folder")
    if wrong := [c for c in "/:\0" if c in value]:
        raise ConfigError(f"{name}={value!r} is not the name of a servable's folder: it has {wrong[0]!r} in it")
    return value


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if is_integer(value) and least <= value and (most is None or value <= most):
        return value
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ConfigError(f"{name}={value!r} is not an integer {limits}")


def is_integer(value: object) -> TypeGuard[int]:
    """True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}={value!r} is not a number of seconds of at least 0")
    return value


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a bool")
    return value


def check_optional(name: str, value: object, kind: type[T]) -> T | None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} is neither None nor a {kind.__module__}.{kind.__name__}")
    return value


def check_address(name: str, value: object) -> Address:
    """`ip:port` or `host:port`."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is not ip:port, as a str")
    return parse_address(value, name)


def check_known_address(name: str, value: object) -> Address:
    """As `check_address`, of a host that there is now: the one that this process is to listen at."""
    address = check_address(name, value)
    try:
        socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{name}={value!r}: there is no host {address.host!r}: {error}") from error
    return address


def check_far_address(name: str, value: object) -> Address:
    """As `check_address`, of a host that there may be later: some names (a headless service, another container) are
    known only once the server runs. What can be no name at all is an error all the same."""
    address = check_address(name, value)
    try:
        address.host.encode("idna")  # As the socket module does.
    except UnicodeError as error:
        raise ConfigError(f"{name}={value!r}: there is no host {address.host!r}: {error}") from error
    return address
