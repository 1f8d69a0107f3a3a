"""Distributed servables: declared in servable_config.py, started by the server's script, their agents on each host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future

from shardserve.agent.supervisor import HostOptions, Supervisor
from shardserve.errors import ConfigError
from shardserve.servable import declare_distributed as declare_servable
from shardserve.server.front import launcher
from shardserve.server.launcher import ServableOptions
from shardserve.server.paths import resolve
from shardserve.server.runtime import current_runtime
from shardserve.settings import Settings
from shardserve.wire.sockets import parse_address

__all__ = ["declare_servable", "start_servable", "startup_agents"]

LAST_PORT = 65535


def start_servable(
    servable_directory: str,
    servable_name: str,
    rank_table_json_file: str,
    version_number: int = 1,
    distributed_address: str = "127.0.0.1:6200",
    wait_agents_time_in_seconds: float = 0,
) -> None:
    """Starts the Distributed Worker of a servable and returns when every agent is ready.

    Relative paths are taken from the running script's directory. With wait_agents_time_in_seconds 0 it waits for ever,
    else a StartError says how many of how many agents came and which ranks are missing.
    """
    begin_servable(
        servable_directory,
        servable_name,
        rank_table_json_file,
        version_number,
        distributed_address,
        wait_agents_time_in_seconds,
    ).result()


def begin_servable(
    servable_directory: str,
    servable_name: str,
    rank_table_json_file: str,
    version_number: int = 1,
    distributed_address: str = "127.0.0.1:6200",
    wait_agents_time_in_seconds: float = 0,
) -> Future[None]:
    """As `start_servable`, but returns as soon as agents can come; the future is done when every agent is ready."""
    if not isinstance(version_number, int) or isinstance(version_number, bool) or version_number < 1:
        raise ConfigError(f"version_number={version_number!r} is not an integer of at least 1")
    if wait_agents_time_in_seconds < 0:
        raise ConfigError(f"wait_agents_time_in_seconds={wait_agents_time_in_seconds!r} is negative")
    options = ServableOptions(
        servable_directory=resolve(servable_directory),
        servable_name=servable_name,
        version_number=version_number,
        rank_table_json_file=resolve(rank_table_json_file),
        distributed_address=parse_address(distributed_address, "distributed_address"),
        wait_agents_time_in_seconds=wait_agents_time_in_seconds,
    )
    current = launcher()
    service = current_runtime().call(current.open_servable(options))
    return current_runtime().begin(current.run_servable(service))


def startup_agents(
    distributed_address: str,
    model_files: Sequence[str],
    group_config_files: Sequence[str] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    device_type: str | None = None,
) -> None:
    """Starts all agents of this host, returns once all are registered, and keeps them alive in the background.

    May be called before or after the server is there. model_files: one graph file per rank of this host, in rank order;
    group_config_files: the same for the configs, by default the group_config.json beside each. Agent i listens on
    agent_start_port + i. agent_ip and rank_start, both or neither, say who this host is where the rank table has none
    of its addresses. Errors name the file, rank or count that is wrong.
    """
    begin_agents(
        distributed_address, model_files, group_config_files, agent_start_port, agent_ip, rank_start, device_type
    ).result()


def begin_agents(
    distributed_address: str,
    model_files: Sequence[str],
    group_config_files: Sequence[str] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    device_type: str | None = None,
) -> Future[None]:
    """As `startup_agents`, but returns at once; the future is done when all agents are registered."""
    options = HostOptions(
        distributed_address=str(parse_address(distributed_address, "distributed_address")),
        model_files=tuple(resolve(path) for path in _paths("model_files", model_files)),
        group_config_files=_configs(model_files, group_config_files),
        agent_start_port=agent_start_port,
        agent_ip=agent_ip,
        rank_start=rank_start,
        device_type=device_type,
    )
    if not 0 < agent_start_port <= LAST_PORT - len(model_files):
        raise ConfigError(f"agent_start_port={agent_start_port!r} leaves no room for {len(model_files)} ports")
    if (agent_ip is None) != (rank_start is None):
        raise ConfigError("agent_ip and rank_start: give both or neither")
    if device_type not in (None, "cpu", "cuda"):
        raise ConfigError(f"device_type={device_type!r} is none of None, 'cpu', 'cuda'")
    for path in options.model_files:
        if not os.path.isfile(path):
            raise ConfigError(f"model_files: there is no file {path}")
    settings = Settings.from_environment()
    ready: Future[None] = Future()

    def on_ready(error: Exception | None) -> None:
        if error is None:
            ready.set_result(None)
        else:
            ready.set_exception(error)

    current_runtime().settle(lambda: Supervisor(options, settings, on_ready))
    return ready


def _paths(name: str, given: Sequence[str]) -> Sequence[str]:
    if isinstance(given, str) or not given or any(not isinstance(path, str) or not path for path in given):
        raise ConfigError(f"{name}: {given!r} is not a list of paths, one per rank of this host")
    return given


def _configs(model_files: Sequence[str], given: Sequence[str] | None) -> tuple[str | None, ...]:
    if given is None:
        return (None,) * len(model_files)
    if len(given) != len(model_files):
        raise ConfigError(f"group_config_files has {len(given)} entries, model_files {len(model_files)}")
    return tuple(resolve(path) for path in _paths("group_config_files", given))
