"""One replica's group of agents and its generations: forms them, numbers and sends steps, ends and re-forms.

States: waiting (agents are missing) -> forming -> serving -> ending (survivors leave their waits) -> waiting …
A group whose agents are all there and that could not form max_formings times in a row has a `failure`, and tries on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from shardserve.errors import JoinRefused
from shardserve.settings import Settings
from shardserve.wire.frames import NoMemory, Payload
from shardserve.wire.messages import Generation, group
from shardserve.wire.messages.front import ReplicaState
from shardserve.wire.segments import Parcel
from shardserve.wire.stream import FrameStream
from shardserve.worker.calls import Batch, Ending
from shardserve.worker.rendezvous import Rendezvous
from shardserve.worker.timeline import StepTimeline

logger = logging.getLogger(__name__)

# Of form_backoff, while a group can't form: the longest pause is 256 times the first.
BACKOFF_DOUBLINGS = 8

# By kind of device.
COLLECTIVES = {"cpu": ("shared_memory", "gloo"), "cuda": ("nccl", "gloo")}


class GroupOwner(Protocol):
    """What a group needs of the Worker around it."""

    def next_generation(self) -> Generation: ...
    def group_changed(self) -> None: ...
    def step_ended(self) -> None: ...
    def answered(self, batch: Batch, payload: Payload) -> Callable[[], None]: ...
    def failed(self, batch: Batch, message: str) -> None: ...
    def interrupted(self, batches: list[Batch], ending: Ending) -> None: ...
    def kill(self, agent: AgentHandle, reason: str) -> None: ...
    def forgive(self, rank: int) -> None: ...


@dataclass(eq=False)
class AgentHandle:
    """A registered agent. local: its rank within the replica. host: by the rank table."""

    rank: int
    local: int
    stage: int
    host: str
    device: str
    pid: int
    stage_address: str
    stream: FrameStream[group.FromGroup]


@dataclass(eq=False)
class StepInFlight:
    """raised: the ranks, of the replica, that said that the model raised."""

    batch: Batch
    failed: bool
    timer: asyncio.TimerHandle
    sent: float
    raised: set[int] = field(default_factory=set)


class ReplicaGroup:
    """replica: its number. dropped: frames that came from an agent in another generation. timeline: its last steps."""

    def __init__(
        self, replica: int, rank_size: int, stage_size: int, window: int, owner: GroupOwner, settings: Settings
    ) -> None:
        self.replica = replica
        self.window = window
        self.generation = Generation(0, 0)
        self.state: ReplicaState = "waiting"
        self.endings = 0
        self.dropped = 0
        self.agents: dict[int, AgentHandle] = {}
        self.timeline = StepTimeline(settings.timeline_steps)
        self._rank_size = rank_size
        self._per_stage = rank_size // stage_size
        self._leader = rank_size - self._per_stage
        self._owner = owner
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._pending: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._next_step = 0
        self._steps: dict[int, StepInFlight] = {}
        # Of the generation that is ending, or ended last: its deaths, and the ranks that had said before that the model
        # raised.
        self._ending = Ending(owner.forgive)
        self._raised: set[int] = set()
        self._rendezvous = Rendezvous()
        # In a row, and why the last one has.
        self._failed_formings = 0
        self._forming_failure = ""

    @property
    def in_flight(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        return self.state == "serving" and len(self._steps) < self.window

    @property
    def exclusive(self) -> bool:
        """Whether a suspect is under way: nothing may join it."""
        return any(step.batch.suspect for step in self._steps.values())

    def check_device(self, rank: int, device: str) -> None:
        """JoinRefused where the collective that the settings ask for isn't one of this kind of device."""
        chosen, kind = self._settings.collective, device.partition(":")[0]
        if self._per_stage > 1 and chosen not in ("auto", *COLLECTIVES[kind]):
            raise JoinRefused(
                f"rank {rank}: runs on {device}; SHARDSERVE_COLLECTIVE={chosen} is for "
                f"{'CPUs' if kind == 'cuda' else 'CUDA devices'}"
            )

    def add(self, agent: AgentHandle) -> None:
        """A rank that isn't there yet has registered."""
        assert agent.local not in self.agents
        self.agents[agent.local] = agent
        self._form_if_complete()
        self._owner.group_changed()

    def lost(self, agent: AgentHandle) -> None:
        """The agent's connection ended."""
        if self.agents.get(agent.local) is not agent:
            return
        del self.agents[agent.local]
        casualty: int | None = agent.rank
        if agent.local in (self._raised if self.state == "ending" else self._ranks_that_raised()):
            # The request has the error. A CUDA device that has asserted is of no more use to its process.
            self._owner.forgive(agent.rank)
            casualty = None
        if self.state in ("forming", "serving"):
            self.end(f"rank {agent.rank} (pid {agent.pid}, {agent.host}) is gone", casualty)
        elif self.state == "ending":
            if casualty is not None:
                self._ending.died(casualty)
            self._left(agent.local)
        self._owner.group_changed()

    def _ranks_that_raised(self) -> set[int]:
        return {local for step in self._steps.values() for local in step.raised}

    def _form_if_complete(self) -> None:
        if self.state != "waiting" or len(self.agents) < self._rank_size:
            return
        self.generation = self._owner.next_generation()
        self.state = "forming"
        self._next_step = 0
        self._rendezvous = Rendezvous()
        self._pending = set(self.agents)
        self._start_timer(self._settings.form_timeout, self._form_timed_out)
        for agent in self.agents.values():
            successor = self.agents.get(agent.local + self._per_stage)
            agent.stream.send(
                group.Form(
                    self.generation,
                    self._collective(agent.stage),
                    successor.stage_address if successor is not None else None,
                )
            )

    def _collective(self, stage: int) -> str:
        if self._settings.collective != "auto":
            return self._settings.collective
        ranks = [agent for agent in self.agents.values() if agent.stage == stage]
        # The registry has seen to it that all are of one kind.
        if ranks[0].device.startswith("cuda"):
            return "nccl"
        hosts = {agent.host for agent in ranks}
        return "shared_memory" if len(hosts) == 1 else "gloo"

    def _form_timed_out(self) -> None:
        ranks = ", ".join(str(self.agents[local].rank) for local in sorted(self._pending))
        seconds = self._settings.form_timeout
        for local in list(self._pending):
            self._owner.kill(self.agents[local], f"did not join generation {self.generation} within {seconds} s")
        self._forming_failed(f"rank {ranks} did not join within form_timeout ({seconds} s)")

    def _forming_failed(self, reason: str) -> None:
        """All ranks are there, and yet they can't form: a death is another matter, and has limits of its own."""
        self._failed_formings += 1
        self._forming_failure = reason
        self.end(reason)

    def end(self, reason: str, casualty: int | None = None) -> None:
        """Ends the generation for all; its unanswered batches go back to the owner. casualty: the rank whose death has
        ended it, if that isn't forgiven already."""
        assert self.state in ("forming", "serving")
        logger.warning("replica %d: generation %s ends: %s", self.replica, self.generation, reason)
        self.state = "ending"
        self.endings += 1
        self._ending = Ending(self._owner.forgive)
        if casualty is not None:
            self._ending.died(casualty)
        self._raised = self._ranks_that_raised()
        now = time.monotonic()
        for number, step in self._steps.items():
            step.timer.cancel()
            self.timeline.record(self.generation, number, step.batch, step.sent, now, step.failed, ended=True)
        steps, self._steps = list(self._steps.values()), {}
        self._pending = set(self.agents)
        for agent in self.agents.values():
            agent.stream.send(group.End(self.generation))
        self._start_timer(self._settings.abort_timeout, self._abort_timed_out)
        self._owner.interrupted([step.batch for step in steps if not step.failed], self._ending)
        self._finish_ending()
        self._owner.group_changed()

    def _abort_timed_out(self) -> None:
        for local in self._pending:
            seconds = self._settings.abort_timeout
            self._owner.kill(self.agents[local], f"did not leave generation {self.generation} within {seconds} s")

    def _left(self, local: int) -> None:
        self._pending.discard(local)
        self._finish_ending()

    def _finish_ending(self) -> None:
        if self.state == "ending" and not self._pending:
            self._cancel_timer()
            self.state = "waiting"
            if self._failed_formings:
                pause = self._settings.form_backoff * 2 ** min(self._failed_formings - 1, BACKOFF_DOUBLINGS)
                self._start_timer(pause, self._form_if_complete)
            else:
                self._form_if_complete()

    @property
    def failure(self) -> str | None:
        """Why an operator has to look after this replica; it tries on all the same."""
        count = self._failed_formings
        if count < self._settings.max_formings:
            return None
        return f"replica {self.replica} could not form, {count} times in a row: {self._forming_failure}"

    def send_step(self, batch: Batch) -> None:
        """Runs the batch as the next step; needs `has_room`."""
        assert self.has_room
        number, self._next_step = self._next_step, self._next_step + 1
        timer = self._loop.call_later(self._settings.step_timeout, self._step_timed_out, number)
        self._steps[number] = StepInFlight(batch, False, timer, time.monotonic())
        step = group.Step(self.generation, number, batch.subgraph, batch.dims, batch.reset)
        buffers = [array.reshape(-1).view(np.uint8).data for array in batch.arrays]
        with Parcel(buffers) as parcel:
            for agent in self.agents.values():
                agent.stream.send(step, parcel if agent.stage == 0 else ())

    def _step_timed_out(self, number: int) -> None:
        seconds = self._settings.step_timeout
        self.end(f"step {number} had no answer from rank {self._leader_rank} within step_timeout ({seconds} s)")

    @property
    def _leader_rank(self) -> int:
        return self.agents[self._leader].rank

    def handle(self, agent: AgentHandle, message: group.FromGroup, payload: Payload | NoMemory) -> None:
        """A message of a registered agent of this group."""
        generation = getattr(message, "generation", None)
        if generation != self.generation or self.agents.get(agent.local) is not agent:
            self.dropped += 1
            return
        match message:
            case group.Output(step=number) if self.state == "serving":
                self._output(number, payload)
            case group.StepFailed(step=number, message=text) if self.state == "serving":
                self._step_failed(agent, number, text)
            case group.StoreCall(call=call) if self.state in ("forming", "serving"):
                reply = partial(self._store_reply, agent.stream, call)
                self._rendezvous.call(message, reply)
            case group.Formed() if self.state == "forming":
                self._formed(agent)
            case group.Broken(message=text) if self.state == "forming":
                self._forming_failed(f"rank {agent.rank}: {text}")
            case group.Broken(message=text) if self.state == "serving":
                self.end(f"rank {agent.rank}: {text}")
            case group.StepFailed() if self.state == "ending":
                # Of the same input as the rank whose death has ended it: what it may die of is no more its own fault.
                self._raised.add(agent.local)
            case group.Parked() if self.state == "ending":
                self._left(agent.local)
                self._owner.group_changed()
            case _:
                self.dropped += 1

    def _store_reply(self, stream: FrameStream[group.FromGroup], call: int, value: bytes) -> None:
        stream.send(group.StoreReply(self.generation, call, value))

    def _formed(self, agent: AgentHandle) -> None:
        self._pending.discard(agent.local)
        if not self._pending:
            self._cancel_timer()
            self.state = "serving"
            self._failed_formings = 0
            logger.info("replica %d: generation %s serves", self.replica, self.generation)
            self._owner.group_changed()

    def _output(self, number: int, payload: Payload | NoMemory) -> None:
        now = time.monotonic()
        step = self._steps.get(number)
        if step is None:
            self.dropped += 1
            return
        deliver = None
        if isinstance(payload, NoMemory):
            self._failed(step, f"MemoryError: the Worker has {payload} of outputs")
        elif not step.failed:
            # A payload of the wrong size raises and ends the agent's connection: then the step is still under way.
            deliver = self._owner.answered(step.batch, payload)
        step.timer.cancel()
        del self._steps[number]
        self.timeline.record(self.generation, number, step.batch, step.sent, now, step.failed, ended=False)
        # The next step first: what is sent to clients may be large, and agents would wait for it.
        self._owner.step_ended()
        if deliver is not None:
            deliver()

    def _step_failed(self, agent: AgentHandle, number: int, text: str) -> None:
        agent.stream.send(group.FailureNoted(self.generation, number))
        step = self._steps.get(number)
        # Absent if the rank raised after its last collective: the leader's answer came first, and is right.
        if step is None:
            return
        step.raised.add(agent.local)
        self._failed(step, text)

    def _failed(self, step: StepInFlight, text: str) -> None:
        if not step.failed:
            step.failed = True
            self._owner.failed(step.batch, text)

    def close(self) -> None:
        """Stops for good. Main has ended before, so nobody waits for what is under way."""
        self._cancel_timer()
        for step in self._steps.values():
            step.timer.cancel()
        self._steps.clear()
        self.state = "waiting"

    def _start_timer(self, seconds: float, action: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
