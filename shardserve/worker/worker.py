"""The Worker process: puts registry, groups, scheduler and requests together, and speaks with launcher and Main."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

from shardserve.errors import ShardserveError, StartError
from shardserve.progress import agents_waited_for, remind
from shardserve.servable import ModelStage, load_servable
from shardserve.settings import Settings
from shardserve.shards.config import Signature
from shardserve.wire.frames import Payload
from shardserve.wire.messages import Generation, front, group, launch, stages
from shardserve.wire.security import Admission, Security
from shardserve.wire.sockets import tune
from shardserve.wire.stream import FrameStream
from shardserve.worker.calls import Batch, Ending
from shardserve.worker.connections import FrontConnection, GroupConnection
from shardserve.worker.group import AgentHandle, ReplicaGroup
from shardserve.worker.model_calls import ModelCalls, model_batchings, program_number
from shardserve.worker.placement import ranks_and_files
from shardserve.worker.registry import HostHandle, Registry
from shardserve.worker.requests import Requests
from shardserve.worker.scheduler import Scheduler
from shardserve.worker.stages.pool import StagePool
from shardserve.worker.timeline import AgentInquiries

logger = logging.getLogger(__name__)


class Worker:
    """Serves one servable version until it is stopped. ConfigError, RankTableError or, for a certificate, StartError if
    that can't work."""

    def __init__(self, serve: launch.Serve, settings: Settings, launcher: FrameStream[launch.ToWorker]) -> None:
        self._serve = serve
        self._settings = settings
        self._launcher = launcher
        self._incarnation = serve.incarnation
        self._counter = 0
        self._servable = load_servable(serve.servable_directory, serve.servable_name)
        self._table, model_files = ranks_and_files(self._servable, serve)
        model = self._servable.model
        assert model is not None
        self._model = model
        window = model.stage_size + settings.steps_ahead if model.enable_pipeline_infer else 1
        self._groups = [
            ReplicaGroup(replica, model.rank_size, model.stage_size, window, self, settings)
            for replica in range(len(self._table.entries) // model.rank_size)
        ]
        self._scheduler = Scheduler(self._groups, settings, self._hopeless)
        self._registry = Registry(
            self._servable, serve.version, self._table, self._groups, self._models_came, model_files
        )
        self.inquiries = AgentInquiries(self._groups, settings)
        self._signatures: Sequence[Signature] = ()
        self._model_calls = ModelCalls(self._servable, self._scheduler)
        self._python_stages = StagePool(
            servable=self._servable,
            load=stages.Load(serve.servable_directory, serve.servable_name, serve.version),
            # Stateful: each replica is held by a method call, which may be in a Python stage.
            size=max(1, serve.num_parallel_workers, len(self._groups) if model.stateful else 0),
            models=self._model_calls,
            settings=settings,
            changed=self.group_changed,
            failed=self._stages_failed,
            first_start=not serve.was_ready,
        )
        self._was_ready = serve.was_ready
        self._state, self._reason = self._derived_state()
        self._reminder: asyncio.Future[None] | None = None
        self._mains: list[FrameStream[front.ToWorker]] = []
        self._servers: list[asyncio.Server] = []
        # Read by each Worker anew: certificates are renewed while a server runs.
        self.admission = Admission(Security.load(serve.security), "Worker", settings.join_timeout)
        self._connections: set[FrameStream[group.FromGroup]] = set()
        self._joining: dict[FrameStream[group.FromGroup], None] = {}
        self._all_left = asyncio.Event()
        self._ready_order: int | None = serve.order
        # Of complaints that the agents' supervisor logs as well: where it is in the launcher's process, whoever reads
        # the output wants to see them once.
        self.complaints = logging.INFO if serve.own_agents else logging.WARNING

    async def start(self, distributed: socket.socket, local: socket.socket, front_listener: socket.socket) -> None:
        """Takes agents on the first two listeners (TCP and its local twin), Main on the third."""
        loop = asyncio.get_running_loop()
        for listener in (distributed, local):
            self._servers.append(await loop.create_server(lambda: GroupConnection(self).stream, sock=listener))
        self._servers.append(await loop.create_server(lambda: FrontConnection(self).stream, sock=front_listener))
        self._python_stages.start()
        if self._serve.wait_agents_time_in_seconds > 0:
            loop.call_later(self._serve.wait_agents_time_in_seconds, self._waited_enough)
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        if self._ready_order is not None:
            missing, reason = tuple(self._registry.missing), self._registry.given_up_first
            self._launcher.send(launch.Waiting(len(self._table.entries), missing, reason))

    def _waited_enough(self) -> None:
        total, missing = len(self._table.entries), self._registry.missing
        if self._ready_order is None or not missing:
            # All agents have come. What is waited for now, groups that form and processes of Python stages, has limits
            # of its own.
            return
        reason = f"; {self._registry.given_up_first}" if self._registry.given_up_first else ""
        self._refuse_start(
            StartError(
                f"servable {self._servable.name!r}: {total - len(missing)} of {total} agents came within "
                f"wait_agents_time_in_seconds={self._serve.wait_agents_time_in_seconds:g}; "
                f"missing: rank {', '.join(map(str, missing))}{reason}"
            )
        )

    def _refuse_start(self, error: ShardserveError) -> None:
        order, self._ready_order = self._ready_order, None
        if order is not None:
            self._launcher.send(launch.Refused(order, type(error).__name__, str(error)))

    async def stop(self) -> None:
        """Main has drained: tells agents and supervisors to leave and waits for them, up to exit_timeout."""
        self._stop_reminding()
        self._set_state("stopping", "the servable is stopped")
        for server in self._servers:
            server.close()
        self._scheduler.close("the servable is stopped")
        self._python_stages.close("the servable is stopped")
        for replica in self._groups:
            replica.close()
        for stream in list(self._connections):
            stream.send(group.Exit("the servable is stopped"))
        if self._connections:
            try:
                await asyncio.wait_for(self._all_left.wait(), self._settings.exit_timeout)
            except asyncio.TimeoutError:
                logger.warning("%d agents and supervisors did not leave in time", len(self._connections))

    # What groups ask of their owner.

    def next_generation(self) -> Generation:
        self._counter += 1
        return Generation(self._incarnation, self._counter)

    def answered(self, batch: Batch, payload: Payload) -> Callable[[], None]:
        return self._scheduler.answered(batch, payload)

    def failed(self, batch: Batch, message: str) -> None:
        self._scheduler.failed(batch, message)

    def interrupted(self, batches: list[Batch], ending: Ending) -> None:
        self._scheduler.interrupted(batches, ending)

    def kill(self, agent: AgentHandle, reason: str) -> None:
        self._registry.kill(agent, reason)

    def forgive(self, rank: int) -> None:
        self._registry.forgive(rank)

    def step_ended(self) -> None:
        self._scheduler.pump()

    def group_changed(self) -> None:
        if self._state == "stopping" or self._python_stages.closed:
            return
        self._registry.tell_hosts()
        self._tell_waiting()
        state, reason = self._derived_state()
        if state == "failed" and self._state != "failed":
            self._scheduler.close(reason)
            if not self._registry.given_up_first:
                logger.error("%s", reason)
                self._refuse_start(StartError(reason))
            # Otherwise a rank was given up, and other agents may come in its place: a start goes on waiting.
        elif state != "failed":
            self._scheduler.reopen()
        self._set_state(state, reason)
        self._remind_of_missing()
        self._scheduler.pump()

    def _derived_state(self) -> tuple[front.ServableState, str]:
        """The servable's state, and the reason for it, from what its replicas are doing."""
        if any(replica.state == "serving" for replica in self._groups):
            # Ready means all replicas and stage processes, the first time; afterwards one replica is enough to answer,
            # and to a Worker that was respawned.
            if self._python_stages.ready and all(replica.state == "serving" for replica in self._groups):
                self._was_ready = True
            if not self._was_ready:
                return "starting", ""
            return ("ready", "") if self._python_stages.ready else ("recovering", "its Python stages load")
        failures = [self._hopeless(replica) for replica in self._groups]
        if all(failures):
            return "failed", failures[0] or ""
        if self._registry.missing or not self._was_ready:
            return "recovering" if self._was_ready else "starting", self._waits
        return "recovering", "the group re-forms"

    def _hopeless(self, replica: ReplicaGroup) -> str | None:
        """Why an operator has to look after this replica."""
        return self._registry.given_up(replica.replica) or replica.failure

    @property
    def _waits(self) -> str:
        return f"waits for {agents_waited_for(len(self._table.entries), self._registry.missing)}"

    def _remind_of_missing(self) -> None:
        """Says in the log that agents stay away; as long as the launcher waits, it does."""
        if self._ready_order is not None or not (self._was_ready and self._registry.missing):
            self._stop_reminding()
        elif self._reminder is None:
            notice = remind(
                self._settings.waiting_notice,
                lambda: "; ".join(filter(None, (self._waits, self._registry.given_up_first))),
            )
            self._reminder = asyncio.ensure_future(notice)

    def _stop_reminding(self) -> None:
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None

    def _set_state(self, state: front.ServableState, reason: str) -> None:
        self._state, self._reason = state, reason
        # Main hears of it first: whoever waits for the launcher may call at once.
        self._announce()
        if state == "ready" and self._ready_order is not None:
            self._launcher.send(launch.Done(self._ready_order))
            self._ready_order = None

    def _models_came(self, signatures: Sequence[Signature]) -> None:
        batchings = model_batchings(self._servable, signatures)
        self._signatures = signatures
        self._scheduler.set_models(batchings)

    # Supervisors and agents.

    def introduced(self, stream: FrameStream[group.FromGroup], message: group.Introduce) -> HostHandle:
        return self._registry.introduce(stream, message)

    def enlist(self, host: HostHandle, message: group.Enlist) -> None:
        self._registry.enlist(host, message)

    def register(
        self, stream: FrameStream[group.FromGroup], message: group.Register
    ) -> tuple[ReplicaGroup, AgentHandle]:
        if message.incarnation > self._incarnation:
            # An older launcher counted further than ours: generations stay totally ordered for this agent.
            self._incarnation = message.incarnation + 1
            self._launcher.send(launch.Incarnation(self._incarnation))
        return self._registry.register(stream, message, self._incarnation)

    def gave_up(self, message: group.GaveUp) -> None:
        replica = message.rank // self._model.rank_size
        first = self._registry.given_up(replica) is None
        self._registry.give_up(message.rank, message.reason)
        if first:
            logger.log(
                self.complaints, "replica %d waits for other agents: %s", replica, self._registry.given_up(replica)
            )
        self.group_changed()

    def _stages_failed(self, reason: str) -> None:
        """No Python stage can run any more, whatever the groups do."""
        logger.error("%s", reason)
        self._scheduler.close(reason)
        self._set_state("failed", reason)
        self._refuse_start(StartError(reason))

    def came(self, stream: FrameStream[group.FromGroup], connection: socket.socket) -> None:
        """Whoever it is, it hasn't proved it yet; too many such can keep nobody out but each other."""
        tune(connection, self._settings.peer_timeout)
        if len(self._joining) >= self._settings.max_joining:
            next(iter(self._joining)).abort()
        self._joining[stream] = None

    def admitted(self, stream: FrameStream[group.FromGroup]) -> None:
        self._joining.pop(stream, None)
        self._connections.add(stream)
        self._all_left.clear()

    def left(self, stream: FrameStream[group.FromGroup], host: HostHandle | None) -> None:
        self._joining.pop(stream, None)
        self._connections.discard(stream)
        if host is not None:
            self._registry.hosts.remove(host)
            self.group_changed()
        if not self._connections:
            self._all_left.set()

    # Main.

    def new_requests(self, stream: FrameStream[front.ToWorker]) -> Requests:
        self._mains.append(stream)
        stream.send(self._status())
        return Requests(self._servable, self._model_calls, self._python_stages)

    def main_left(self, stream: FrameStream[front.ToWorker]) -> None:
        self._mains.remove(stream)

    def _announce(self) -> None:
        status = self._status()
        for stream in self._mains:
            stream.send(status)

    def _status(self) -> front.Announce:
        return front.Announce(
            name=self._servable.name,
            version=self._serve.version,
            state=self._state,
            reason=self._reason,
            rank_size=self._model.rank_size,
            stage_size=self._model.stage_size,
            methods={
                method.name: front.MethodInfo(method.inputs, method.output_names, self._dtypes(method.name))
                for method in self._servable.methods.values()
            },
            replicas=tuple(self._replica_status(replica) for replica in self._groups),
        )

    def _dtypes(self, method: str) -> dict[str, str]:
        """The dtypes that the model takes for those inputs of the method that go straight to it."""
        if not self._signatures:
            return {}
        declared = self._servable.methods[method]
        return {
            declared.inputs[source.index]: spec.dtype
            for stage in declared.stages
            if isinstance(stage, ModelStage)
            for source, spec in zip(stage.inputs, self._signature(stage).inputs, strict=True)
            if source.stage == 0
        }

    def _signature(self, stage: ModelStage) -> Signature:
        return self._signatures[program_number(self._servable, stage.model, 0)]

    def _replica_status(self, replica: ReplicaGroup) -> front.ReplicaStatus:
        size, per_stage = self._model.rank_size, self._model.rank_size // self._model.stage_size
        ranks = []
        for entry in self._table.entries[replica.replica * size : (replica.replica + 1) * size]:
            agent = replica.agents.get(entry.rank % size)
            stage = entry.rank % size // per_stage
            if agent is None:
                ranks.append(front.RankStatus(entry.rank, stage, entry.host, "", 0, "absent"))
            else:
                state: front.RankState = "serving" if replica.state == "serving" else "joined"
                ranks.append(front.RankStatus(entry.rank, stage, entry.host, agent.device, agent.pid, state))
        missing = [rank.rank for rank in ranks if rank.state == "absent"]
        reason = self._hopeless(replica) or ""
        if missing and not reason:
            reason = f"waits for {agents_waited_for(size, missing)}"
        return front.ReplicaStatus(
            replica=replica.replica,
            generation=replica.generation,
            state=replica.state,
            restarts=replica.endings,
            ranks=tuple(ranks),
            dropped=replica.dropped,
            reason=reason,
        )
