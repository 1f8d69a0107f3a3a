"""The addresses that the front ends listen on, and why one of them can't."""

from __future__ import annotations

import os
import socket
import stat

from shardserve.errors import StartError
from shardserve.wire.sockets import Address, grpc_target, listen_tcp, parse_address

# The kernel's sun_path has 108 bytes, the last of which is a NUL.
LONGEST_PATH = 107


def listen(address: str, what: str) -> socket.socket:
    """A socket that listens on exactly this `ip:port`; StartError names it and the reason, ConfigError what is none."""
    listener = listen_tcp(parse_address(address, what), what)
    listener.setblocking(False)
    return listener


def check_free(address: str, what: str) -> str:
    """The `ip:port` or `unix:path` as gRPC takes it; StartError if somebody listens there (gRPC takes Unix sockets
    over), ConfigError for what is neither."""
    if not isinstance(address, str) or not address.startswith("unix:"):
        with listen_tcp(parse_address(address, what, "ip:port or unix:path"), what) as listener:
            return str(Address(*listener.getsockname()[:2]))
    path = address.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path:
        parse_address(address, what, "ip:port or unix:path")
    if (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise StartError(f"{what} {address}: a socket's path has at most {LONGEST_PATH} bytes, this has {length}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise StartError(f"{what} {address}: there is no folder {os.path.dirname(path)}")
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return grpc_target(path)
    if not is_socket:
        raise StartError(f"{what} {address}: a file that isn't a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return grpc_target(path)
        except OSError as error:
            raise StartError(f"{what} {address}: {error.strerror}") from error
    raise StartError(f"{what} {address}: the socket is in use")
