"""What `startup_agents` was asked for, and the ranks of this host that come of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from shardserve.agent.collectives.memory import create_memory, slot_size
from shardserve.agent.forking import ForkRequest
from shardserve.agent.supervisor.processes import AgentProcess
from shardserve.errors import ConfigError
from shardserve.log import servable_in_words
from shardserve.restarts import RestartBudget
from shardserve.settings import Settings
from shardserve.shards.config import CONFIG_FILE, ShardConfig
from shardserve.wire.messages import group
from shardserve.wire.messages.launch import UNGUARDED, SecurityFiles

MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What `startup_agents` was asked for. model_files: for each rank of this host, in rank order, the graph files of
    its subgraphs; None where the Worker knows them (servables that are not distributed). group_config_files: as those.
    vital: a rank that is given up ends them all, where nothing is left to serve without it. with_server: their server
    is in this process, and says itself what it waits for.
    """

    distributed_address: str
    model_files: tuple[tuple[str, ...], ...] | None
    group_config_files: tuple[tuple[str | None, ...], ...]
    agent_start_port: int
    agent_ip: str | None
    rank_start: int | None
    device_type: str | None
    vital: bool = False
    with_server: bool = False
    security: SecurityFiles = UNGUARDED


@dataclass(eq=False)
class AgentSlot:
    """One rank of this host and the process that has it now. left: the last one was told to leave by the Worker."""

    request: ForkRequest
    shared_memory: int | None
    restarts: RestartBudget
    process: AgentProcess | None = None
    given_up: str | None = None
    left: bool = False


class LoadedWeights(NamedTuple):
    """What this host's agents had loaded when all were ready: bytes of weights, and seconds from the first's fork."""

    size: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.size / MEGABYTE:.3g} MB of weights loaded in {self.seconds:.1f} s"


def plan_slots(options: HostOptions, message: group.Enlisted, supervisor: str, settings: Settings) -> list[AgentSlot]:
    """A slot for each rank that the Worker says is this host's. ConfigError or ShardError names the file that is wrong.

    supervisor: the name by which the Worker knows it.
    """
    per_stage = message.rank_size // message.stage_size
    threads = settings.agent_threads or max(1, len(os.sched_getaffinity(0)) // len(message.ranks))
    model_files, config_files = options.model_files, options.group_config_files
    if model_files is None:
        model_files = (message.model_files,) * len(message.ranks)
        config_files = ((None,) * len(message.model_files),) * len(message.ranks)
    for rank, graphs, configs in zip(message.ranks, model_files, config_files, strict=True):
        for graph, config in zip(graphs, configs, strict=True):
            _check_files(rank, rank % message.rank_size, graph, config)
    memories = _group_memories(message.ranks, per_stage, slot_size(settings))
    slots = []
    for i, (rank, device) in enumerate(zip(message.ranks, message.devices, strict=True)):
        request = ForkRequest(
            rank=rank,
            host=message.host,
            device=f"cuda:{device}" if options.device_type == "cuda" else "cpu",
            worker_address=options.distributed_address,
            stage_port=options.agent_start_port + i,
            threads=threads,
            model_files=model_files[i],
            config_files=config_files[i],
            security=options.security,
            supervisor=supervisor,
            servable=servable_in_words(message.servable, message.version),
        )
        slots.append(AgentSlot(request, memories.get(rank // per_stage), RestartBudget(settings)))
    return slots


def _group_memories(ranks: tuple[int, ...], per_stage: int, slot_bytes: int) -> dict[int, int]:
    """Shared memory for each tensor-parallel group all of whose ranks are here, by the group's number."""
    memories = {}
    for number in {rank // per_stage for rank in ranks}:
        members = range(number * per_stage, (number + 1) * per_stage)
        if per_stage > 1 and set(members) <= set(ranks):
            memories[number] = create_memory(per_stage, slot_bytes)
    return memories


def _check_files(rank: int, local: int, model_file: str, config_file: str | None) -> None:
    """What can be told without torch, before an agent is forked for it."""
    if not os.path.isfile(model_file):
        raise ConfigError(f"model_files: rank {rank}: there is no file {model_file}")
    path = config_file or os.path.join(os.path.dirname(model_file), CONFIG_FILE)
    config = ShardConfig.load(path)
    if config.rank != local:
        raise ConfigError(f"{path}: is the config of device{config.rank}; rank {rank} needs that of device{local}")
