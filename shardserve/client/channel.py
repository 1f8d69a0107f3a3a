"""How a client reaches a server: address, TLS, channel options, timeouts."""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import grpc

from shardserve.errors import ConfigError
from shardserve.wire.sockets import grpc_target, parse_address
from shardserve.wire.tls import why

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Connections that no other channel shares: after a fork a new channel must not find those of the parent.
    ("grpc.use_local_subchannel_pool", 1),
    # After a refused connection gRPC fails calls without trying again until its back-off is over: keep that short.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$")

# gRPC takes a deadline as a point in time, which has an end.
LONGEST = 1e9


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
        """What a secure channel takes; ConfigError names a file that can't be read or isn't what it should be."""
        # gRPC takes any bytes, and then no connection comes about.
        _check_pem(self.custom_ca, "CERTIFICATE")
        _check_pem(self.certificate, "CERTIFICATE")
        _check_pem(self.private_key, "PRIVATE KEY")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.certificate is not None:
                # A password is never asked for on a terminal: gRPC takes keys without one.
                context.load_cert_chain(self.certificate, self.private_key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"TLS files {self.certificate} and {self.private_key}: {why(error)}") from error
        try:
            if self.custom_ca is not None:
                context.load_verify_locations(self.custom_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"TLS file {self.custom_ca}: {why(error)}") from error
        return grpc.ssl_channel_credentials(
            _read(self.custom_ca) if self.custom_ca is not None else _system_roots(),
            _read(self.private_key),
            _read(self.certificate),
        )


def target(address: str) -> str:
    """The address as gRPC takes it: ip:port, name:port or unix:path; ConfigError for anything else."""
    if isinstance(address, str) and address.startswith("unix:") and len(address) > len("unix:"):
        return grpc_target(address.removeprefix("unix:"))
    return str(parse_address(address, "address", "host:port or unix:path"))


def connect(address: str, ssl_config: SSLConfig | None) -> grpc.Channel:
    """A channel, which connects when it is first used; ConfigError for an address or files that can't be."""
    where, credentials = target(address), _credentials(ssl_config)
    if credentials is None:
        return grpc.insecure_channel(where, _options(where))
    return grpc.secure_channel(where, credentials, _options(where))


def connect_async(address: str, ssl_config: SSLConfig | None) -> grpc.aio.Channel:
    """The same for the running event loop."""
    where, credentials = target(address), _credentials(ssl_config)
    if credentials is None:
        return grpc.aio.insecure_channel(where, _options(where))
    return grpc.aio.secure_channel(where, credentials, _options(where))


def seconds(timeout: float | None) -> float | None:
    """The timeout as gRPC takes it; None and infinity are none. ConfigError for what isn't a positive number."""
    if timeout is None:
        return None
    if not isinstance(timeout, Real) or isinstance(timeout, bool) or not timeout > 0:
        raise ConfigError(f"timeout={timeout!r} is not a positive number of seconds, or None for no limit")
    return None if timeout == math.inf else min(float(timeout), LONGEST)


def _options(where: str) -> tuple[tuple[str, int], ...]:
    # gRPC asks the proxy of the environment (http_proxy) for this host's own addresses, too.
    return (*OPTIONS, ("grpc.enable_http_proxy", 0)) if LOOPBACK.match(where) else OPTIONS


def _credentials(ssl_config: SSLConfig | None) -> grpc.ChannelCredentials | None:
    if ssl_config is None:
        return None
    if not isinstance(ssl_config, SSLConfig):
        raise ConfigError(f"ssl_config is a shardserve.client.SSLConfig, got {type(ssl_config).__name__}")
    return ssl_config.credentials()


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file {path}: {error.strerror}") from error


def _check_pem(path: str | None, what: str) -> None:
    content = _read(path)
    if content is not None and not re.search(rf"-----BEGIN [A-Z ]*{what}-----".encode(), content):
        raise ConfigError(f"TLS file {path}: is no PEM file with a line -----BEGIN {what}-----")


def _system_roots() -> bytes | None:
    """The roots that this host trusts, where OpenSSL keeps them in a file; None leaves the choice to gRPC."""
    path = ssl.get_default_verify_paths().cafile
    return _read(path)
