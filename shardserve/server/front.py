"""The front ends of the server: gRPC and REST."""

from __future__ import annotations

from dataclasses import dataclass

from shardserve.errors import ConfigError
from shardserve.server.launcher import Launcher
from shardserve.server.paths import resolve
from shardserve.server.runtime import current_runtime
from shardserve.settings import Settings
from shardserve.wire.messages import launch


@dataclass(frozen=True)
class SSLConfig:
    """Files in PEM: the server's certificate and key; `custom_ca` with `verify_client` asks clients for theirs."""

    certificate: str
    private_key: str
    custom_ca: str | None = None
    verify_client: bool = False

    def files(self) -> launch.TLSFiles:
        return launch.TLSFiles(
            resolve(self.certificate),
            resolve(self.private_key),
            resolve(self.custom_ca) if self.custom_ca is not None else None,
            self.verify_client,
        )


_launcher: Launcher | None = None


def launcher() -> Launcher:
    """The process's launcher, started if there is none."""
    global _launcher
    runtime = current_runtime()
    if _launcher is None or not runtime.houses(_launcher):
        settled = runtime.settle(lambda: Launcher(Settings.from_environment()))
        assert isinstance(settled, Launcher)
        _launcher = settled
    return _launcher


def start_grpc_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Serves gRPC on `ip:port` or `unix:path`. StartError for a port in use, ConfigError for a size not in 1 to 512."""
    _check_size(max_msg_mb_size)
    tls = ssl_config.files() if ssl_config is not None else None
    if address.startswith("unix:"):
        address = "unix:" + resolve(address.removeprefix("unix:"))
    current = launcher()
    current_runtime().call(current.start_front(lambda n: launch.StartGrpc(n, address, max_msg_mb_size, tls)))


def start_restful_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Serves REST on `ip:port`. StartError for a port in use, ConfigError for a size not in 1 to 512."""
    _check_size(max_msg_mb_size)
    tls = ssl_config.files() if ssl_config is not None else None
    current = launcher()
    current_runtime().call(current.start_front(lambda n: launch.StartRest(n, address, max_msg_mb_size, tls)))


def _check_size(size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 512:
        raise ConfigError(f"max_msg_mb_size={size!r} is not an integer from 1 to 512")
