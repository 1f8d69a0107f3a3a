"""Servables that are not distributed: a model on one device, with a replica on each device that it is given.

They run through the same Worker and agents as distributed ones: groups of one rank, on a free port of 127.0.0.1, whose
agents this process starts and watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path

from shardserve.agent.supervisor.slots import HostOptions, LoadedWeights
from shardserve.agent.supervisor.supervisor import Supervisor
from shardserve.errors import ConfigError, Unavailable
from shardserve.progress import Progress, quietly
from shardserve.server.arguments import LAST_VERSION, check_integer, check_path, check_servable_name, is_integer
from shardserve.server.front import launcher
from shardserve.server.launcher import ServableOptions
from shardserve.server.paths import resolve
from shardserve.server.runtime import RuntimeEnded
from shardserve.settings import Settings
from shardserve.wire.sockets import Address

DEVICE_TYPES = {None: None, "cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


@dataclass(frozen=True)
class ServableStartConfig:
    """One servable to start: servable_directory/servable_name has servable_config.py and, for each version, a folder
    named by its number with the models' files.

    device_ids: a replica on each; one id, a list of them, or None for one replica on device 0. version_number: 0 for
    the latest there is. device_type: None, "cpu", "cuda" or "gpu" (None: CPU). num_parallel_workers: processes for
    Python stages; 0 for one.
    """

    servable_directory: str
    servable_name: str
    device_ids: int | Sequence[int] | None = None
    version_number: int = 0
    device_type: str | None = None
    num_parallel_workers: int = 0

    def __post_init__(self) -> None:
        check_path("ServableStartConfig: servable_directory", self.servable_directory)
        check_servable_name("ServableStartConfig: servable_name", self.servable_name)
        check_integer("ServableStartConfig: version_number", self.version_number, 0, LAST_VERSION)
        check_integer("ServableStartConfig: num_parallel_workers", self.num_parallel_workers, 0)
        devices = self.devices
        if not devices or any(not is_integer(device) or device < 0 for device in devices) or _has_equal(devices):
            raise ConfigError(f"ServableStartConfig: device_ids={self.device_ids!r} are not different device numbers")
        if self.device_type is not None and not isinstance(self.device_type, str):
            raise ConfigError(f"ServableStartConfig: device_type={self.device_type!r} is no name")
        if self.device_kind not in DEVICE_TYPES:
            raise ConfigError(
                f"ServableStartConfig: device_type={self.device_type!r} is none of None, 'cpu', 'cuda', 'gpu'"
            )

    @property
    def devices(self) -> tuple[int, ...]:
        if self.device_ids is None:
            return (0,)
        return tuple(self.device_ids) if isinstance(self.device_ids, Sequence) else (self.device_ids,)

    @property
    def device_kind(self) -> str | None:
        return self.device_type.lower() if self.device_type is not None else None

    def options(self) -> ServableOptions:
        """ConfigError if there is no such version."""
        directory = resolve(self.servable_directory)
        return ServableOptions(
            servable_directory=directory,
            servable_name=self.servable_name,
            version_number=self.version_number or _latest(Path(directory) / self.servable_name),
            rank_table_json_file="",
            distributed_address=Address("127.0.0.1", 0),
            wait_agents_time_in_seconds=0,
            num_parallel_workers=max(1, self.num_parallel_workers),
            devices=self.devices,
            own_agents=True,
        )


def start_servables(servable_configs: ServableStartConfig | Sequence[ServableStartConfig]) -> None:
    """Starts servables that are not distributed and returns when every replica is ready.

    Relative paths are taken from the running script's directory. ConfigError says what is wrong with a config, a
    servable_config.py or a model's files, or that a servable is started already.
    """
    start_and_tell(servable_configs, quietly)


def start_and_tell(servable_configs: ServableStartConfig | Sequence[ServableStartConfig], progress: Progress) -> None:
    """As `start_servables`; `progress` hears of the agents that come."""
    configs = servable_configs if isinstance(servable_configs, Sequence) else [servable_configs]
    if not configs or not all(isinstance(config, ServableStartConfig) for config in configs):
        raise ConfigError(f"servable_configs={servable_configs!r} is neither a ServableStartConfig nor a list of them")
    all_options = [config.options() for config in configs]
    keys = [(options.servable_name, options.version_number) for options in all_options]
    for name, version in keys:
        if keys.count((name, version)) > 1:
            raise ConfigError(f"start_servables: servable {name!r} version {version} is given twice")
    starts = [_Start(config, options, progress) for config, options in zip(configs, all_options, strict=True)]
    for start in starts:
        start.wait()


class _Start:
    """A servable on its way: the Worker and the supervisor of its agents."""

    def __init__(self, config: ServableStartConfig, options: ServableOptions, progress: Progress) -> None:
        current, self._runtime = launcher()
        service = self._runtime.call(current.open_servable(options))
        self._served: Future[None] = self._runtime.begin(current.run_servable(service, progress))
        self._agents_error: BaseException | None = None
        host = HostOptions(
            distributed_address=str(service.options.distributed_address),
            model_files=None,
            group_config_files=(),
            # Groups of one rank have no stage links: none of these agents listens.
            agent_start_port=0,
            agent_ip=None,
            rank_start=None,
            device_type=DEVICE_TYPES[config.device_kind],
            with_server=True,
        )
        settings = Settings.from_environment()
        ready: Future[LoadedWeights | None] = Future()
        ready.add_done_callback(self._agents_ready)
        self._supervisor = self._runtime.settle(lambda: Supervisor(host, settings, ready))
        # A callback, since nobody may wait for this one any more: another may have failed first.
        self._served.add_done_callback(self._end_agents_if_failed)

    def _agents_ready(self, ready: Future[LoadedWeights | None]) -> None:
        error = ready.exception()
        # Unavailable means that the Worker has told its agents to leave; why, it says itself.
        if error is not None and not isinstance(error, Unavailable):
            self._agents_error = error
            self._served.cancel()

    def wait(self) -> None:
        """Returns when the servable is ready; raises why it can't be."""
        try:
            self._served.result()
        except CancelledError:
            assert self._agents_error is not None
            raise self._agents_error from None

    def _end_agents_if_failed(self, served: Future[None]) -> None:
        if served.cancelled() or served.exception() is not None:
            with contextlib.suppress(RuntimeEnded):  # So have the agents.
                self._runtime.begin(self._stop_agents())

    async def _stop_agents(self) -> None:
        self._supervisor.stop()


def _latest(folder: Path) -> int:
    versions = [int(path.name) for path in folder.glob("[1-9]*") if path.name.isdecimal() and path.is_dir()]
    if not versions:
        raise ConfigError(
            f"{folder}: has no version; a version is a folder named by its number, such as {folder / '1'}"
        )
    return max(versions)


def _has_equal(devices: Sequence[int]) -> bool:
    return len(set(devices)) < len(devices)
