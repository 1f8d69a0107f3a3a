"""The addresses that the front ends listen on, and why one of them can't."""

from __future__ import annotations

import errno
import os
import socket
import stat

from shardserve.errors import StartError


def parse(address: str, what: str) -> tuple[str, int]:
    """Host and port of `ip:port`, `[ip]:port` or `name:port`; StartError if it's none of them."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise StartError(f"{what} address {address!r} isn't ip:port with a port of 1 to 65535")
    return host, int(port)


def listen(address: str, what: str) -> socket.socket:
    """A socket that listens on exactly this address; StartError names it and the reason, a port in use above all."""
    host, port = parse(address, what)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartError(f"{what} address {address}: {error.strerror}") from error
    # A name may have several addresses; gRPC is content when one of them is free, and we want no half of "localhost".
    family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        raise StartError(f"{what} address {address}: {reason}") from error
    listener.setblocking(False)
    return listener


def check_free(address: str, what: str) -> str:
    """The address as gRPC takes it; StartError if somebody listens there (gRPC takes Unix sockets over)."""
    path = address.removeprefix("unix:")
    if path == address:
        with listen(address, what) as listener:
            host, port = listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path:
        raise StartError(f"{what} address {address!r} has no path")
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return address
    if not is_socket:
        raise StartError(f"{what} address {address}: a file that isn't a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return address
        except OSError as error:
            raise StartError(f"{what} address {address}: {error.strerror}") from error
    raise StartError(f"{what} address {address}: the socket is in use")
