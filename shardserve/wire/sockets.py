"""Addresses, listeners and blocking connections. Nothing here listens wider than the address that it was given.

Each TCP listener of ours has a twin on the same host: an abstract Unix socket named after the address, which spares
local peers TCP, has no file to leave behind, and checks that both sides run as the same user. Where nothing else says
who may join (wire/security.py) it is the only way in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shardserve.errors import ConfigError, StartError
from shardserve.settings import Settings

# A name, an IPv4 address or an IPv6 address, whose brackets may be missing; what holds a slash is a URL.
HOST = re.compile(r"[^\s/\[\]]+|\[[^\s/\[\]]+\]")


MEANT_BY_URIS = re.compile("[%?#]")

# A listener may be bound to them; another host that connects to them finds itself.
EVERY_ADDRESS = ("0.0.0.0", "::")


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, what: str, form: str = "ip:port") -> Address:
    """`ip:port`, `[ip]:port` or `name:port`, the port from 1 to 65535; ConfigError names `what` (an argument), the text
    and the form that it should have."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    digits = port.isascii() and port.isdecimal() and len(port) <= len("65535")
    if not colon or not HOST.fullmatch(host) or not digits or not 0 < int(port) < 65536:
        raise ConfigError(f"{what}: {text!r} is not {form}")
    return Address(host.strip("[]"), int(port))


def grpc_target(path: str) -> str:
    """A Unix socket as gRPC takes it, which reads a URI: what has a meaning there is escaped."""
    return "unix:" + MEANT_BY_URIS.sub(lambda found: f"%{ord(found[0]):02X}", path)


def twin_name(address: Address) -> str:
    """The abstract Unix name (without its NUL) of the listener at this TCP address."""
    return f"shardserve-{address}"


def listen_tcp(address: Address, what: str) -> socket.socket:
    """StartError says that the port is in use, that nobody knows the name, or that the address isn't this host's."""
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise StartError(f"{what} {address}: {getattr(error, 'strerror', error)}") from error
    # A name may have several addresses, and half of "localhost" is no use to those who try the other one first.
    family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise StartError(f"{what} {address}: {reason}") from error
    return listener


def listen_abstract(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + name)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise StartError(f"local socket {name}: {error.strerror}") from error
    return listener


class Peer(NamedTuple):
    """The process that made the other side of a Unix socket."""

    pid: int
    uid: int
    gid: int


_UCRED = struct.Struct("3i")


def peer_of(connection: socket.socket) -> Peer:
    """As the kernel knows it (SO_PEERCRED, unix(7))."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def same_user(connection: socket.socket) -> bool:
    """Whether the other side of a Unix socket runs as this user or as root."""
    return peer_of(connection).uid in (os.getuid(), 0)


# Probes of a connection on which nothing is under way, in the second half of peer_timeout.
PROBES = 3


def tune(connection: socket.socket, peer_timeout: float = Settings.peer_timeout) -> None:
    """No waiting for more to send; and a host that is gone without a word ends the connection after peer_timeout,
    whether data is under way (TCP_USER_TIMEOUT) or not (keepalive), see tcp(7)."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(peer_timeout / 2)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(peer_timeout / 2 / PROBES)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(peer_timeout * 1000))


def connect(
    address: Address, timeout: float, peer_timeout: float = Settings.peer_timeout, local_only: bool = True
) -> socket.socket:
    """A blocking connection: through the local twin if there is one of this user, else TCP. OSError if nobody listens;
    with `local_only` PermissionError if whoever does is there by TCP alone, or as another user."""
    for name in _twins(address):
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(ConnectionRefusedError):
            local.connect("\0" + name)
            if same_user(local):
                return local
        local.close()
    connection = socket.create_connection(address, timeout)
    if local_only:
        connection.close()
        raise PermissionError(
            errno.EACCES,
            f"whoever listens at {address} is no local process of this user or root, so has to prove itself: "
            "give both sides join_secret_file",
        )
    connection.settimeout(None)
    tune(connection, peer_timeout)
    return connection


def _twins(address: Address) -> Iterator[str]:
    """As the other side may have called the address: by the same text, or by what a name like localhost stands for."""
    yield twin_name(address)
    for found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        yield twin_name(Address(str(found[4][0]), address.port))


def connect_within(
    address: Address,
    seconds: float,
    interval: float,
    stopped: threading.Event,
    peer_timeout: float = Settings.peer_timeout,
    failed: Callable[[OSError], object] = lambda error: None,
    local_only: bool = True,
) -> socket.socket | None:
    """Tries to connect until somebody listens; None after `seconds` (infinity: never) or when `stopped` is set. A name
    that isn't known may be so later. `failed` is told why a try was one.

    A listener that isn't there yet, perhaps on another host, is no event to wait for: hence the interval between tries.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return connect(address, max(interval, min(deadline - time.monotonic(), 10.0)), peer_timeout, local_only)
        except OSError as error:
            failed(error)
            if time.monotonic() + interval > deadline or stopped.wait(interval):
                return None


def is_local(host: str) -> bool:
    """Whether this host has the address: only its own can be bound. 0.0.0.0 and its kin are no address of any."""
    if "\0" in host:
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return probe.getsockname()[0] not in EVERY_ADDRESS
