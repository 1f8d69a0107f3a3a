"""Distributed servables: declared in servable_config.py, started by the server's script, their agents on each host."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Future

from shardserve.agent.supervisor.slots import HostOptions, LoadedWeights
from shardserve.agent.supervisor.supervisor import Supervisor
from shardserve.errors import ConfigError
from shardserve.progress import Progress, quietly
from shardserve.servable import declare_distributed as declare_servable
from shardserve.server.arguments import (
    LAST_VERSION,
    check_bool,
    check_far_address,
    check_integer,
    check_known_address,
    check_optional,
    check_optional_path,
    check_path,
    check_seconds,
    check_servable_name,
)
from shardserve.server.front import SSLConfig, launcher
from shardserve.server.launcher import ServableOptions
from shardserve.server.paths import resolve
from shardserve.server.runtime import settle
from shardserve.settings import Settings
from shardserve.wire.messages.launch import SecurityFiles
from shardserve.wire.security import Security, check_guarded
from shardserve.wire.sockets import Address, is_local

__all__ = ["declare_servable", "start_servable", "startup_agents"]

LAST_PORT = 65535


def start_servable(
    servable_directory: str,
    servable_name: str,
    rank_table_json_file: str,
    version_number: int = 1,
    distributed_address: str = "127.0.0.1:6200",
    wait_agents_time_in_seconds: float = 0,
    join_secret_file: str | None = None,
    ssl_config: SSLConfig | None = None,
    insecure: bool = False,
) -> None:
    """Starts the Distributed Worker of a servable and returns when every agent is ready.

    Relative paths are taken from the running script's directory. With wait_agents_time_in_seconds 0 it waits for ever,
    else a StartError says how many of how many agents came and which ranks are missing. Beyond loopback it needs a
    join_secret_file (or SHARDSERVE_JOIN_SECRET_FILE) or an ssl_config that its agents have, too, unless `insecure`;
    with the custom_ca of an ssl_config agents need a certificate of that CA.
    """
    begin_servable(
        servable_directory,
        servable_name,
        rank_table_json_file,
        version_number,
        distributed_address,
        wait_agents_time_in_seconds,
        join_secret_file,
        ssl_config,
        insecure,
    ).result()


def begin_servable(
    servable_directory: str,
    servable_name: str,
    rank_table_json_file: str,
    version_number: int = 1,
    distributed_address: str = "127.0.0.1:6200",
    wait_agents_time_in_seconds: float = 0,
    join_secret_file: str | None = None,
    ssl_config: SSLConfig | None = None,
    insecure: bool = False,
    num_parallel_workers: int = 1,
    own_agents: bool = False,
    progress: Progress = quietly,
) -> Future[None]:
    """As `start_servable`, but returns as soon as agents can come; the future is done when every agent is ready.

    num_parallel_workers: processes for Python stages. own_agents: this process starts the agents, too. progress hears
    of the agents that come.
    """
    address = check_known_address("distributed_address", distributed_address)
    options = ServableOptions(
        servable_directory=resolve(check_path("servable_directory", servable_directory)),
        servable_name=check_servable_name("servable_name", servable_name),
        version_number=check_integer("version_number", version_number, 1, LAST_VERSION),
        rank_table_json_file=resolve(check_path("rank_table_json_file", rank_table_json_file)),
        distributed_address=address,
        wait_agents_time_in_seconds=check_seconds("wait_agents_time_in_seconds", wait_agents_time_in_seconds),
        num_parallel_workers=num_parallel_workers,
        own_agents=own_agents,
        security=_security(address, join_secret_file, ssl_config, insecure),
    )
    current, runtime = launcher()
    service = runtime.call(current.open_servable(options))
    return runtime.begin(current.run_servable(service, progress))


def startup_agents(
    distributed_address: str,
    model_files: Sequence[str | Sequence[str]],
    group_config_files: Sequence[str | Sequence[str]] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    device_type: str | None = None,
    join_secret_file: str | None = None,
    ssl_config: SSLConfig | None = None,
    insecure: bool = False,
) -> None:
    """Starts all agents of this host, returns once all are registered, and keeps them alive in the background.

    May be called before or after the server is there, or its host's name is known. model_files: per rank of this
    host, in rank order, a graph file or a list of them (its subgraphs); group_config_files: the same for the configs,
    by default the group_config.json beside each graph file. Agent i listens on agent_start_port + i. agent_ip and
    rank_start, both or neither, say who this host is where the rank table has none of its addresses. join_secret_file,
    ssl_config, insecure: as in start_servable; a certificate is for this host's address in the table (or agent_ip).
    Errors name the file, rank or count that is wrong.
    """
    begin_agents(
        distributed_address,
        model_files,
        group_config_files,
        agent_start_port,
        agent_ip,
        rank_start,
        device_type,
        join_secret_file,
        ssl_config,
        insecure,
    ).result()


def begin_agents(
    distributed_address: str,
    model_files: Sequence[str | Sequence[str]],
    group_config_files: Sequence[str | Sequence[str]] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    device_type: str | None = None,
    join_secret_file: str | None = None,
    ssl_config: SSLConfig | None = None,
    insecure: bool = False,
    vital: bool = False,
    with_server: bool = False,
    progress: Progress = quietly,
) -> Future[LoadedWeights | None]:
    """As `startup_agents`, but returns at once; the future is done when all agents are registered, and has what they
    loaded, if that is known.

    vital: a rank that dies too often ends all that this process runs, with an error. with_server: the server is in this
    process, too. progress hears of the agents that load and come.
    """
    address = check_far_address("distributed_address", distributed_address)
    options = HostOptions(
        distributed_address=str(address),
        model_files=_paths("model_files", model_files),
        group_config_files=_configs(model_files, group_config_files),
        agent_start_port=agent_start_port,
        agent_ip=agent_ip,
        rank_start=rank_start,
        device_type=device_type,
        vital=vital,
        with_server=with_server,
        security=_security(address, join_secret_file, ssl_config, insecure),
    )
    _check_host(options)
    settings = Settings.from_environment()
    ready: Future[LoadedWeights | None] = Future()
    settle(lambda: Supervisor(options, settings, ready, progress))
    return ready


def _check_host(options: HostOptions) -> None:
    """What can be told before anything is started; ConfigError names the argument or file that is wrong."""
    start, ranks = options.agent_start_port, options.group_config_files
    check_integer("agent_start_port", start, 1, LAST_PORT)
    if start + len(ranks) - 1 > LAST_PORT:
        raise ConfigError(f"agent_start_port={start!r} leaves no room for {len(ranks)} ports")
    if (options.agent_ip is None) != (options.rank_start is None):
        raise ConfigError(f"agent_ip={options.agent_ip!r} and rank_start={options.rank_start!r}: give both or neither")
    if options.rank_start is not None:
        check_integer("rank_start", options.rank_start, 0)
    if options.agent_ip is not None and not (isinstance(options.agent_ip, str) and is_local(options.agent_ip)):
        raise ConfigError(f"agent_ip={options.agent_ip!r} is not an address of this host")
    if options.device_type not in (None, "cpu", "cuda"):
        raise ConfigError(f"device_type={options.device_type!r} is none of None, 'cpu', 'cuda'")
    for path in itertools.chain.from_iterable(options.model_files or ()):
        if not os.path.isfile(path):
            raise ConfigError(f"model_files: there is no file {path}")


def _security(
    address: Address, join_secret_file: str | None, ssl_config: SSLConfig | None, insecure: bool
) -> SecurityFiles:
    """What of it there is, checked; ConfigError or StartError names the argument or file that is missing or wrong."""
    given = check_optional_path("join_secret_file", join_secret_file)
    secret_file = given or Settings.from_environment().join_secret_file
    tls = check_optional("ssl_config", ssl_config, SSLConfig)
    files = SecurityFiles(
        resolve(secret_file) if secret_file else None,
        tls.files() if tls is not None else None,
        check_bool("insecure", insecure),
    )
    check_guarded(address.host, files, "distributed_address")
    # The Worker and each agent read them for themselves; here a mistake is told before anything is started.
    Security.load(files)
    return files


def _paths(name: str, given: Sequence[str | Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """For each rank its files, resolved; ConfigError for what isn't a list of paths or of lists of paths."""
    ranks = [[rank] if isinstance(rank, str) else rank for rank in given] if isinstance(given, list | tuple) else []
    if not ranks or any(not isinstance(rank, list | tuple) or not rank for rank in ranks):
        raise ConfigError(
            f"{name}: {given!r} is not a list of paths, one (or a list of subgraphs) per rank of this host"
        )
    if any(not isinstance(path, str) or not path for rank in ranks for path in rank):
        raise ConfigError(
            f"{name}: {given!r} is not a list of paths, one (or a list of subgraphs) per rank of this host"
        )
    if len({len(rank) for rank in ranks}) > 1:
        counts = ", ".join(str(len(rank)) for rank in ranks)
        raise ConfigError(f"{name}: the ranks have different numbers of subgraphs: {counts}")
    return tuple(tuple(map(resolve, rank)) for rank in ranks)


def _configs(
    model_files: Sequence[str | Sequence[str]], given: Sequence[str | Sequence[str]] | None
) -> tuple[tuple[str | None, ...], ...]:
    graphs = _paths("model_files", model_files)
    if given is None:
        return tuple((None,) * len(rank) for rank in graphs)
    configs = _paths("group_config_files", given)
    if len(configs) != len(graphs):
        raise ConfigError(f"group_config_files has {len(configs)} entries, model_files {len(graphs)}")
    if len(configs[0]) != len(graphs[0]):
        raise ConfigError(f"group_config_files has {len(configs[0])} subgraphs a rank, model_files {len(graphs[0])}")
    return configs
