"""An agent's part in one generation: its links, its collective, and the steps that it runs there."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.collectives.gloo import GlooCollective
from shardserve.agent.collectives.group import Alone, GroupCollective
from shardserve.agent.collectives.leaving import LeaveInTime
from shardserve.agent.collectives.memory import slot_size
from shardserve.agent.collectives.nccl import form_nccl
from shardserve.agent.collectives.shared_memory import SharedMemoryCollective
from shardserve.agent.forking import ForkRequest
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.rendezvous import WorkerStore
from shardserve.agent.stage_link import IncomingLink, LinkBroken, OutgoingLink
from shardserve.agent.tensors import Layout, buffers_of, receiving_memory, to_host
from shardserve.agent.timeline import Timeline
from shardserve.errors import MAX_TEXT, described, shortened
from shardserve.settings import Settings
from shardserve.shards.program import Program
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import FrameError, NoMemory, Payload
from shardserve.wire.messages import Generation, group
from shardserve.wire.security import Security
from shardserve.wire.sockets import parse_address

logger = logging.getLogger(__name__)

Connection = FrameSocket[group.ToAgent]

# What breaks an invariant between ranks: no error of the step, nothing to drain; the generation has to end.
BROKEN = (CollectiveBroken, LinkBroken, FrameError)

# Less than MAX_TEXT: a Python stage that called the model says where it was, and a text is cut off once.
MAX_STEP_TEXT = MAX_TEXT - 1000


class Membership:
    """Made when all links and the collective stand; `run` executes steps in the order in which they came."""

    def __init__(
        self,
        form: group.Form,
        lifetime: Lifetime,
        programs: Sequence[Program],
        request: ForkRequest,
        connection: Connection,
        listeners: Sequence[socket.socket],
        shared_memory: int | None,
        settings: Settings,
        security: Security,
        timeline: Timeline,
    ) -> None:
        self.lifetime = lifetime
        self._timeline = timeline
        self._programs = programs
        self._device = programs[0].device
        self._on_cuda = self._device.type == "cuda"
        # On CUDA a step may wait for the device at any operator, and the device for a rank that is gone.
        self._leaving = (
            LeaveInTime(f"a step on {self._device}", lifetime, settings.abort_timeout)
            if self._on_cuda
            else contextlib.nullcontext()
        )
        self._layouts = [Layout(p.config.receives, p.config.signature, p.device) for p in programs]
        self._connection = connection
        config = programs[0].config
        self._first = config.stage == 0
        self._answers = config.stage == config.stage_size - 1 and config.coordinate == 0
        self._collective = self._make_collective(form.collective, request.host, shared_memory, settings)
        self._outgoing: OutgoingLink | None = None
        self._incoming: IncomingLink | None = None
        timeout = settings.form_timeout
        # Connect first, accept then: a connection waits in the other's backlog, so no order of ranks can deadlock.
        if form.next_address is not None:
            address = parse_address(form.next_address, "stage link")
            # Not a method of this object: a cycle of references would keep its shared memory mapped.
            on_failure = partial(_say_broken, connection, lifetime.generation)
            self._outgoing = OutgoingLink(address, request.rank, lifetime, timeout, on_failure, settings, security)
        if not self._first:
            self._incoming = IncomingLink(
                listeners, lifetime, timeout, settings, security, receiving_memory(self._device)
            )

    def _make_collective(self, kind: str, host: str, shared_memory: int | None, settings: Settings) -> GroupCollective:
        config = self._programs[0].config
        rank, size = config.coordinate, config.tensor_parallel_size
        if size == 1:
            return Alone()
        if kind in ("gloo", "nccl"):
            timeout = settings.form_timeout
            store = WorkerStore(self._connection.send, self.lifetime, f"stage{config.stage}/", timeout)
            if kind == "nccl":
                return form_nccl(store, rank, size, host, self._device, self.lifetime, settings)
            return GlooCollective(store, rank, size, host, self.lifetime, settings)
        if shared_memory is None:
            raise CollectiveBroken("the group's ranks are not all agents of one startup_agents, so share no memory")
        return SharedMemoryCollective(
            shared_memory, rank, size, slot_size(settings), self.lifetime, settings.step_timeout
        )

    def run(self, step: group.Step, payload: Payload | NoMemory, received: float) -> None:
        """One step, from its inputs to what it sends. received: when its header was here. GenerationEnded when it was
        cut short."""
        ready = received
        program = self._programs[step.subgraph]
        if self._incoming is not None:
            payload = self._incoming.receive(step.step)
            ready = self._incoming.arrived
        started = time.monotonic()
        self._collective.begin(step.step)
        with self._leaving:
            outputs = self._execute(program, step, payload)
        # Before anything is sent: who has the answer and asks for the timeline then finds this step in it.
        self._timeline.record((step.generation, step.step, received, ready, started, time.monotonic()))
        if self._outgoing is not None:
            self._outgoing.send(step.step, outputs)
        elif self._answers:
            self._connection.send(group.Output(step.generation, step.step), buffers_of(outputs))

    def _execute(self, program: Program, step: group.Step, payload: Payload | NoMemory) -> list[Tensor]:
        config = program.config
        program.begin()
        if step.reset:
            program.reset()
        try:
            if isinstance(payload, NoMemory):
                raise payload
            inputs = self._layouts[step.subgraph].tensors(payload, step.dims)
            return self._finished(program.run(step.dims, inputs, self._collective))
        except (GenerationEnded, *BROKEN):
            raise
        except Exception as error:
            if self.lifetime.ended:
                # The exception may come from the garbage that an aborted collective left.
                raise GenerationEnded from error
            # A traceback from one rank only: on the others of the stage it is mostly the same exception.
            text = shortened(described(error), MAX_STEP_TEXT)
            logger.warning("step %d raised %s", step.step, text, exc_info=config.coordinate == 0)
            self._report(step, text)
        # Not while the exception is there, with all that the step held when it ran out of memory.
        return self._finished(program.drain(step.dims, self._collective))

    def _finished(self, outputs: list[Tensor]) -> list[Tensor]:
        """What of the outputs is sent, once it is there. After an error that CUDA doesn't recover from it raises again
        when what is drained is waited for: the agent then ends, and is forked anew."""
        if self._on_cuda:
            outputs = to_host(outputs if self._outgoing is not None or self._answers else ())
            torch.cuda.current_stream(self._device).synchronize()
        self._collective.finish()
        return outputs

    def _report(self, step: group.Step, message: str) -> None:
        """Tells the Worker, and waits until it knows: only then may others see this rank's zeros."""
        self._connection.send(group.StepFailed(step.generation, step.step, message))
        answer = self.lifetime.await_answer()
        assert isinstance(answer, group.FailureNoted)
        assert answer.step == step.step


def _say_broken(connection: Connection, generation: Generation, text: str) -> None:
    # A Worker that is gone is noticed by the thread that reads its connection.
    with contextlib.suppress(OSError):
        connection.send(group.Broken(generation, text))
