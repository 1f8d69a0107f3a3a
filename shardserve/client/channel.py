"""How a client reaches a server: address, TLS, channel options."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from shardserve.errors import ConfigError
from shardserve.wire.sockets import parse_address

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # After a refused connection gRPC fails calls without trying again until its back-off is over: keep that short.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True)
class SSLConfig:
    """Paths of PEM files. custom_ca: what the server's certificate is checked against (None: the system's roots).

    certificate and private_key are the client's own, for a server with verify_client; both or neither.
    """

    certificate: str | None = None
    private_key: str | None = None
    custom_ca: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("SSLConfig takes both certificate and private_key, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """What a secure channel takes; ConfigError names a file that can't be read."""
        return grpc.ssl_channel_credentials(
            _read(self.custom_ca) if self.custom_ca is not None else _system_roots(),
            _read(self.private_key),
            _read(self.certificate),
        )


def target(address: str) -> str:
    """The address as gRPC takes it: ip:port, name:port or unix:path; ConfigError for anything else."""
    if isinstance(address, str) and address.startswith("unix:") and len(address) > len("unix:"):
        return address
    return str(parse_address(address, "address", "host:port or unix:path"))


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file {path}: {error.strerror}") from error


def _system_roots() -> bytes | None:
    """The roots that this host trusts, where OpenSSL keeps them in a file; None leaves the choice to gRPC."""
    path = ssl.get_default_verify_paths().cafile
    return _read(path)
