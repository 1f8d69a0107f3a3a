"""Who may join: supervisors enlist hosts, agents register ranks, and everything is checked against the rank table."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from shardserve.errors import ConfigError, JoinRefused, ShardError, ShardserveError, Unavailable
from shardserve.servable import ModelStage, Servable
from shardserve.shards.config import ShardConfig, Signature
from shardserve.wire.messages import group
from shardserve.wire.stream import FrameStream
from shardserve.worker.group import AgentHandle, ReplicaGroup
from shardserve.worker.model_calls import program_number
from shardserve.worker.rank_table import RankTable

logger = logging.getLogger(__name__)

# A reason that names its rank begins so, and isn't given the rank a second time.
NAMES_A_RANK = re.compile(r"rank \d")

GroupStream = FrameStream[group.FromGroup]


@dataclass(eq=False)
class HostHandle:
    """A supervisor and the ranks that it keeps. name: a random one, of its own. missing: those of its ranks of which it
    was told last that they aren't there; None: nothing yet."""

    pid: int
    name: str
    stream: GroupStream
    ranks: tuple[int, ...] = ()
    missing: tuple[int, ...] | None = None


class Registry:
    """`on_models(signatures)`, one per program of an agent, is called with the first agent, before it joins.

    model_files: what each agent loads, of a servable that is not distributed; else their supervisors know.
    """

    def __init__(
        self,
        servable: Servable,
        version: int,
        table: RankTable,
        groups: list[ReplicaGroup],
        on_models: Callable[[Sequence[Signature]], None],
        model_files: tuple[str, ...] = (),
    ) -> None:
        assert servable.model is not None
        self._servable = servable
        self._version = version
        self._model = servable.model
        self._table = table
        self._groups = groups
        self._on_models = on_models
        self._model_files = model_files
        self._exports: list[ShardConfig] = []
        self.hosts: list[HostHandle] = []
        self._given_up: dict[int, str] = {}
        # By rank, where its export didn't fit that of the agents that were here: the refusal, and what these agents had
        # brought.
        self._at_odds: dict[int, tuple[str, tuple[str, ...]]] = {}
        # Said again to a supervisor that comes back: it may have lost its connection before it read it.
        self._kills: dict[int, group.Kill] = {}
        # By rank: the name of the supervisor of the agent that is there, or was last.
        self._keepers: dict[int, str] = {}

    def agent(self, rank: int) -> AgentHandle | None:
        replica, local = divmod(rank, self._model.rank_size)
        return self._groups[replica].agents.get(local)

    @property
    def missing(self) -> list[int]:
        """Ranks of the table that no agent has registered for."""
        return [entry.rank for entry in self._table.entries if self.agent(entry.rank) is None]

    def introduce(self, stream: GroupStream, message: group.Introduce) -> HostHandle:
        host = HostHandle(message.pid, message.supervisor, stream)
        self.hosts.append(host)
        stream.send(group.Roster(self._table.hosts))
        return host

    def enlist(self, host: HostHandle, message: group.Enlist) -> None:
        """JoinRefused or ConfigError says which rank, host or count is wrong."""
        if message.rank_start is not None:
            if not 0 <= message.rank_start < len(self._table.entries):
                raise ConfigError(
                    f"rank_start={message.rank_start}: the rank table has ranks 0 to {len(self._table.entries) - 1}"
                )
            hosts: tuple[str, ...] = (self._table.entries[message.rank_start].host,)
        else:
            hosts = message.hosts
        ranks = self._table.ranks_on(hosts)
        if message.rank_start is not None and message.rank_start != ranks[0]:
            raise ConfigError(
                f"rank_start={message.rank_start}: the rank table has rank {message.rank_start} on host {hosts[0]}, "
                f"whose first rank is {ranks[0]}"
            )
        if not ranks:
            raise ConfigError(
                f"none of the rank table's hosts ({', '.join(self._table.hosts)}) is an address of this host; "
                "give agent_ip and rank_start if the table knows it by another one"
            )
        if self._model_files and message.count:
            raise ConfigError(
                f"servable {self._servable.name!r} is not distributed: start_servables starts its agents, "
                "not startup_agents"
            )
        if not self._model_files and message.count != len(ranks):
            listed = ", ".join(map(str, ranks))
            raise ConfigError(
                f"{message.count} model_files for {len(ranks)} ranks: the rank table gives this host rank {listed}"
            )
        for other in list(self.hosts):
            both = set(other.ranks) & set(ranks)
            if both and other is not host and other.name == host.name:
                self._forget(other)
                continue
            if both and other is not host:
                raise JoinRefused(f"rank {min(both)} is already kept by another startup_agents (pid {other.pid})")
        host.ranks = ranks
        entries = [self._table.entries[rank] for rank in ranks]
        host.stream.send(
            group.Enlisted(
                ranks=ranks,
                devices=tuple(entry.device for entry in entries),
                host=message.agent_ip or entries[0].host,
                rank_size=self._model.rank_size,
                stage_size=self._model.stage_size,
                servable=self._servable.name,
                version=self._version,
                model_files=self._model_files,
            )
        )
        for rank in ranks:
            if rank in self._kills and self._keepers[rank] == host.name:
                host.stream.send(self._kills[rank])
        self.tell_hosts()

    def _forget(self, host: HostHandle) -> None:
        """The same supervisor came again: it has lost its connection, and this side hasn't noticed yet."""
        host.stream.abort()
        host.ranks = ()

    def register(
        self, stream: GroupStream, message: group.Register, incarnation: int
    ) -> tuple[ReplicaGroup, AgentHandle]:
        """JoinRefused, ShardError or ConfigError says what doesn't fit, Unavailable that it may come again; else the
        agent is in its group."""
        if not 0 <= message.rank < len(self._table.entries):
            raise JoinRefused(f"rank {message.rank}: the rank table has ranks 0 to {len(self._table.entries) - 1}")
        there = self.agent(message.rank)
        if there is not None and not self._replaces(message):
            # A rank has one supervisor, so the agent that is there is about to end: the one that came is to try again.
            raise Unavailable(f"rank {message.rank}: is already there (pid {there.pid} on {there.host})")
        if there is not None:
            there.stream.abort()
            self._groups[message.rank // self._model.rank_size].lost(there)
        replica, local = divmod(message.rank, self._model.rank_size)
        if not message.configs:
            raise ShardError(f"rank {message.rank}: brings no group config")
        configs = [
            ShardConfig.from_dict(content, f"rank {message.rank}: group config{_which(i, len(message.configs))}")
            for i, content in enumerate(message.configs)
        ]
        self._check_shards(message, configs, local)
        if not any(group.agents for group in self._groups):
            signatures = [config.signature for config in configs]
            self._check_methods(signatures)
            self._on_models(signatures)
            former, now = _export_ids(self._exports), _export_ids(configs)
            if former not in ("", now):
                logger.warning("the export changed from %s, whose agents have all left, to %s", former, now)
            self._exports = configs
        entry = self._table.entries[message.rank]
        agent = AgentHandle(
            rank=message.rank,
            local=local,
            stage=configs[0].stage,
            host=entry.host,
            device=message.device,
            pid=message.pid,
            stage_address=message.stage_address,
            stream=stream,
        )
        self._given_up.pop(message.rank, None)
        self._kills.pop(message.rank, None)
        self._keepers[message.rank] = message.supervisor
        stream.send(group.Registered(incarnation))
        self._groups[replica].add(agent)
        self.tell_hosts()
        return self._groups[replica], agent

    def _replaces(self, message: group.Register) -> bool:
        """Whether the rank's agent is gone, although its connection hasn't ended yet: it comes again, as when its host
        was cut off, or its supervisor has forked another, or another supervisor has its ranks now."""
        keepers = {host.name for host in self.hosts if message.rank in host.ranks}
        return message.supervisor in {self._keepers.get(message.rank), *keepers}

    def _check_shards(self, message: group.Register, configs: Sequence[ShardConfig], local: int) -> None:
        model = self._model
        for i, config in enumerate(configs):
            which = _which(i, len(configs))
            if (config.rank_size, config.stage_size) != (model.rank_size, model.stage_size):
                raise ShardError(
                    f"rank {message.rank}{which}: its shard is of rank_size={config.rank_size}, "
                    f"stage_size={config.stage_size}; servable {self._servable.name!r} declares {model.rank_size}, "
                    f"{model.stage_size}"
                )
            if config.state and not model.stateful:
                names = ", ".join(spec.name for spec in config.state[:3]) + (", …" if len(config.state) > 3 else "")
                raise ShardError(
                    f"rank {message.rank}{which}: its shard keeps buffers between steps ({names}), which steps of "
                    f"other clients would change: servable {self._servable.name!r} has to declare stateful=True"
                )
            if config.rank != local:
                raise ShardError(
                    f"rank {message.rank}{which}: needs the shard device{local}, was given device{config.rank}"
                )
        self._groups[0].check_device(message.rank, message.device)
        other = self._first
        if other:
            try:
                self._check_beside(other, message, configs)
            except ShardserveError as error:
                self._at_odds[message.rank] = str(error), self._brought
                raise

    @property
    def _first(self) -> AgentHandle | None:
        """The lowest rank that is there, not the one that came first: so what is said of two at odds is always the
        same."""
        agents = (agent for group in self._groups for agent in group.agents.values())
        return min(agents, key=attrgetter("rank"), default=None)

    @property
    def _brought(self) -> tuple[str, ...]:
        """What all agents that are here have alike, and others have to fit; () if none is."""
        first = self._first
        return (first.device.partition(":")[0], *(config.export_id for config in self._exports)) if first else ()

    def _check_beside(self, other: AgentHandle, message: group.Register, configs: Sequence[ShardConfig]) -> None:
        if len(configs) != len(self._exports):
            raise ShardError(
                f"rank {message.rank}: brings {len(configs)} subgraphs, rank {other.rank} brought {len(self._exports)}"
            )
        for i, (config, first) in enumerate(zip(configs, self._exports, strict=True)):
            if config.export_id != first.export_id:
                raise ShardError(
                    f"rank {message.rank}{_which(i, len(configs))}: its shard is of export {config.export_id}, "
                    f"that of rank {other.rank} of export {first.export_id}"
                )
        kind = message.device.partition(":")[0]
        if kind != other.device.partition(":")[0]:
            raise JoinRefused(
                f"rank {message.rank}: runs on {message.device}, rank {other.rank} on {other.device}; "
                "all ranks run on the same kind of device"
            )

    def _check_methods(self, signatures: Sequence[Signature]) -> None:
        programs = sum(len(model.files or signatures) for model in self._servable.models)
        if programs != len(signatures):
            raise ConfigError(f"the servable's models have {programs} graph files; an agent has {len(signatures)}")
        for method in self._servable.methods.values():
            for stage in method.stages:
                if not isinstance(stage, ModelStage):
                    continue
                signature = signatures[program_number(self._servable, stage.model, 0)]
                given, taken = len(stage.inputs), len(signature.inputs)
                if given != taken:
                    raise ConfigError(f"method {method.name!r} gives the model {given} inputs; its shards take {taken}")
                if stage.outputs_count != len(signature.outputs):
                    raise ConfigError(
                        f"method {method.name!r}: outputs_count={stage.outputs_count}; the model's shards give "
                        f"{len(signature.outputs)}"
                    )

    def tell_hosts(self) -> None:
        """HostReady to each supervisor whose agents have come, HostWaits to the others, where that is news."""
        for host in self.hosts:
            # A supervisor that has ended may have left agents whose connections haven't ended yet.
            missing = tuple(
                rank for rank in host.ranks if self.agent(rank) is None or self._keepers.get(rank) != host.name
            )
            if host.ranks and missing != host.missing:
                host.missing = missing
                host.stream.send(group.HostWaits(missing) if missing else group.HostReady())

    def give_up(self, rank: int, reason: str) -> None:
        """Its host doesn't fork this rank again."""
        self._given_up[rank] = reason

    def given_up(self, replica: int) -> str | None:
        """Why a replica will not be complete before an operator has done something."""
        return next((why for rank, why in self._reasons() if rank // self._model.rank_size == replica), None)

    @property
    def given_up_first(self) -> str:
        """Why the first of the ranks that won't come won't; "" if none is given up."""
        return next((why for _, why in self._reasons()), "")

    def _reasons(self) -> Iterator[tuple[int, str]]:
        """The ranks that won't come, and why: without those of which all that is known is no longer so."""
        brought, at_odds = self._brought, dict(self._at_odds.values())
        for rank, reason in self._given_up.items():
            # Looked up by its text: when one of its ranks is refused, a supervisor gives all of them up with this text.
            against = at_odds.get(reason)
            keeper = next((host for host in self.hosts if rank in host.ranks), None)
            if against in (None, brought):
                yield rank, reason if NAMES_A_RANK.match(reason) else f"rank {rank}: {reason}"
            elif keeper is not None:
                ending = f"and its startup_agents (pid {keeper.pid}) does not fork it again"
                yield rank, f"rank {rank}: did not fit agents that have left, {ending}"

    def forgive(self, rank: int) -> None:
        """A death of this rank was a request's fault."""
        for host in self.hosts:
            if rank in host.ranks:
                host.stream.send(group.Forgive(rank))

    def kill(self, agent: AgentHandle, reason: str) -> None:
        """Has the agent's supervisor end it; its connection ends at once, so that nobody waits for it."""
        logger.warning("rank %d (pid %d) is ended: it %s", agent.rank, agent.pid, reason)
        order = self._kills[agent.rank] = group.Kill(agent.rank, agent.pid, reason)
        for host in self.hosts:
            if agent.rank in host.ranks:
                host.stream.send(order)
        agent.stream.abort()


def _export_ids(configs: Sequence[ShardConfig]) -> str:
    """Of an agent's programs; "" if there was none."""
    return ", ".join(dict.fromkeys(config.export_id for config in configs))


def _which(subgraph: int, count: int) -> str:
    return f", subgraph {subgraph}" if count > 1 else ""
