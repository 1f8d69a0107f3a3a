"""The front ends of the server: gRPC and REST."""

from __future__ import annotations

from dataclasses import dataclass

from shardserve.errors import ConfigError
from shardserve.server.arguments import (
    check_address,
    check_bool,
    check_integer,
    check_optional,
    check_optional_path,
    check_path,
)
from shardserve.server.launcher import Launcher
from shardserve.server.paths import resolve
from shardserve.server.runtime import Runtime, settle
from shardserve.settings import Settings
from shardserve.wire.messages import launch

LARGEST_MSG_MB = 512


@dataclass(frozen=True)
class SSLConfig:
    """Files in PEM: the server's certificate and key; `custom_ca` with `verify_client` asks clients for theirs."""

    certificate: str
    private_key: str
    custom_ca: str | None = None
    verify_client: bool = False

    def __post_init__(self) -> None:
        check_path("SSLConfig: certificate", self.certificate)
        check_path("SSLConfig: private_key", self.private_key)
        check_optional_path("SSLConfig: custom_ca", self.custom_ca)
        check_bool("SSLConfig: verify_client", self.verify_client)

    def files(self) -> launch.TLSFiles:
        return launch.TLSFiles(
            resolve(self.certificate),
            resolve(self.private_key),
            resolve(self.custom_ca) if self.custom_ca is not None else None,
            self.verify_client,
        )


_launcher: tuple[Launcher, Runtime] | None = None


def launcher() -> tuple[Launcher, Runtime]:
    """The process's launcher, started if there is none, and the runtime that it lives in."""
    global _launcher
    if _launcher is None or not _launcher[1].houses(_launcher[0]):
        _launcher = settle(lambda: Launcher(Settings.from_environment()))
    return _launcher


def start_grpc_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Serves gRPC on `ip:port` or `unix:path`. StartError for a port in use, ConfigError for a size not in 1 to 512."""
    tls = _checked(max_msg_mb_size, ssl_config)
    if address == "unix:":
        raise ConfigError(f"address={address!r} has no path")
    if isinstance(address, str) and address.startswith("unix:"):
        address = "unix:" + resolve(check_path("address", address.removeprefix("unix:")))
    else:
        check_address("address", address)
    current, runtime = launcher()
    runtime.call(current.start_front(lambda n: launch.StartGrpc(n, address, max_msg_mb_size, tls)))


def start_restful_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Serves REST on `ip:port`. StartError for a port in use, ConfigError for a size not in 1 to 512."""
    tls = _checked(max_msg_mb_size, ssl_config)
    check_address("address", address)
    current, runtime = launcher()
    runtime.call(current.start_front(lambda n: launch.StartRest(n, address, max_msg_mb_size, tls)))


def _checked(max_msg_mb_size: int, ssl_config: SSLConfig | None) -> launch.TLSFiles | None:
    check_integer("max_msg_mb_size", max_msg_mb_size, 1, LARGEST_MSG_MB)
    config = check_optional("ssl_config", ssl_config, SSLConfig)
    return config.files() if config is not None else None
