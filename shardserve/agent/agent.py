"""An agent: one process, one rank. Loads its shard, joins the Worker, follows its orders until it has to leave."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed

from shardserve.agent.compilation import Compilation
from shardserve.agent.cuda_graphs import CudaGraphs
from shardserve.agent.forking import ForkRequest, LastWords, LoadingTeller
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.membership import BROKEN, Connection, Membership
from shardserve.agent.tensors import receiving_memory
from shardserve.agent.timeline import Timeline
from shardserve.errors import ServableError, ShardserveError, StartError, Unavailable, from_wire
from shardserve.log import work_for
from shardserve.settings import Settings
from shardserve.shards.config import ShardConfig
from shardserve.shards.program import Program
from shardserve.shards.state import StateStore
from shardserve.shards.weights import Weights
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import FrameError, NoMemory, Payload
from shardserve.wire.messages import group
from shardserve.wire.security import Admission, Security, is_loopback, perform_handshake
from shardserve.wire.sockets import Address, connect_within, listen_abstract, listen_tcp, parse_address, twin_name

logger = logging.getLogger(__name__)

Order = tuple[group.ToAgent, Payload | NoMemory, Lifetime | None, float]
"""A message, its payload, for a Form the generation's lifetime, and when it came, on CLOCK_MONOTONIC."""


def run_agent(request: ForkRequest, shared_memory: int | None, last_words: int) -> int:
    """The life of a forked agent; its exit code: 0 told to leave, 1 an error, which is in `last_words`."""
    work_for(request.servable)
    try:
        settings = Settings.from_environment()
        # Inputs in shared memory are read-only; no operator that a shard may call writes its arguments.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        torch.set_num_threads(request.threads)
        # SIGALRM's default action ends the process, whatever keeps the load from ending.
        signal.setitimer(signal.ITIMER_REAL, settings.load_timeout)
        teller = LoadingTeller(last_words)
        agent = Agent(request, shared_memory, settings, teller)
        signal.setitimer(signal.ITIMER_REAL, 0)
        teller.loaded()
        with torch.inference_mode():
            agent.serve()
        LastWords("", "told to leave").write(last_words)
        return 0
    except ShardserveError as error:
        prefix = "" if isinstance(error, ServableError) else f"rank {request.rank}: "
        text = prefix + str(error).removeprefix(prefix)
        LastWords(type(error).__name__, text).write(last_words)
        return 1
    except Exception:
        logger.exception("rank %d ends", request.rank)
        return 1


class Agent:
    """ShardError, ConfigError or StartError if the shard can't be loaded or the device or port isn't there."""

    def __init__(
        self, request: ForkRequest, shared_memory: int | None, settings: Settings, told: Callable[[int, int], None]
    ) -> None:
        self._request = request
        self._shared_memory = shared_memory
        self._settings = settings
        _take_device(request)
        # Subgraphs of the same weights share them, and what they keep between steps.
        state = StateStore()
        weights = Weights(settings.weights == "mmap", told)
        self._programs = [
            Program.load(model, config, request.device, weights, state)
            for model, config in zip(request.model_files, request.config_files, strict=True)
        ]
        check_collectives(request.device, self._programs[0].config)
        if settings.compile == "inductor":
            for program, model, config in zip(self._programs, request.model_files, request.config_files, strict=True):
                Compilation(program, model, config, request.threads).start()
        elif settings.compile == "cuda_graphs":
            for program in self._programs:
                CudaGraphs(program).start()
        self._security = Security.load(request.security)
        self._stage_address = Address(request.host, request.stage_port)
        self._listeners = self._listen()
        self._incarnation = 0
        self._registered = False
        self._timeline = Timeline(settings.timeline_steps)

    def _listen(self) -> Sequence[socket.socket]:
        if self._programs[0].config.stage == 0:
            return ()
        twin = listen_abstract(twin_name(self._stage_address))
        if self._security.local_only and not is_loopback(self._request.host):
            # The Worker is on loopback, so all agents are on this host, whatever address the table has for it.
            return (twin,)
        what = f"rank {self._request.rank}: agent_start_port gives it"
        # Where nobody may come by TCP, the port is held all the same: whoever else wants it is told so.
        return (listen_tcp(self._stage_address, what), twin)

    def serve(self) -> None:
        """Works for one Worker after the other until told to leave; Unavailable if none comes for reconnect_timeout."""
        settings = self._settings
        never = threading.Event()
        while True:
            address = parse_address(self._request.worker_address, "distributed_address")
            connected = connect_within(
                address,
                settings.reconnect_timeout,
                settings.connect_retry_interval,
                never,
                settings.peer_timeout,
                local_only=self._security.local_only,
            )
            if connected is None:
                raise Unavailable(f"no Worker at {address} for {settings.reconnect_timeout} s (reconnect_timeout)")
            self._registered = False
            try:
                admission = Admission(self._security, "Worker", settings.join_timeout, address)
                memory = receiving_memory(self._programs[0].device)
                connection: Connection = FrameSocket(
                    perform_handshake(connected, admission), group.ToAgent, share=True, allocate=memory
                )
            except OSError as error:
                logger.warning("rank %d: %s; trying again", self._request.rank, error)
            else:
                if self._work(connection):
                    return
            if not self._registered:
                # A Worker that ends connections without a word may do so for ever.
                never.wait(settings.connect_retry_interval)

    def _work(self, connection: Connection) -> bool:
        """Registers and follows orders; True when told to leave, False when the Worker is gone."""
        orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        reader = OrderReader(connection, orders, self._timeline)
        thread = threading.Thread(target=reader.read, name="orders", daemon=True)
        membership: Membership | None = None
        self._registered = False
        try:
            thread.start()
            connection.send(self._registration())
            while (order := orders.get()) is not None:
                message, payload, lifetime, came = order
                match message:
                    case group.Step():
                        self._step(connection, membership, message, payload, came)
                    case group.Form():
                        assert lifetime is not None
                        membership = self._form(connection, message, lifetime)
                    case group.End(generation=generation):
                        membership = None
                        connection.send(group.Parked(generation))
                    case group.Registered(incarnation=incarnation):
                        self._incarnation = incarnation
                        self._registered = True
                    case group.Refuse(error=error, message=text):
                        raise from_wire(error, text)
                    case group.Exit():
                        return True
                    case _:
                        raise FrameError(f"{type(message).__name__} came out of turn")
                # The next order may be long in coming. As long as this one's payload has a name here, its sender can't
                # use the memory again.
                del order, payload
        except OSError as error:
            logger.warning("rank %d: the Worker is gone: %s", self._request.rank, error)
        finally:
            # The reading thread ends the waits of this generation: it has to be done before another generation can
            # form.
            connection.close()
            thread.join()
        return False

    def _registration(self) -> group.Register:
        return group.Register(
            rank=self._request.rank,
            pid=os.getpid(),
            supervisor=self._request.supervisor,
            device=self._request.device,
            incarnation=self._incarnation,
            stage_address=str(self._stage_address),
            configs=[program.config.to_dict() for program in self._programs],
        )

    def _form(self, connection: Connection, form: group.Form, lifetime: Lifetime) -> Membership | None:
        try:
            membership = Membership(
                form=form,
                lifetime=lifetime,
                programs=self._programs,
                request=self._request,
                connection=connection,
                listeners=self._listeners,
                shared_memory=self._shared_memory,
                settings=self._settings,
                security=self._security,
                timeline=self._timeline,
            )
        except GenerationEnded:
            return None
        except (OSError, TimeoutError, *BROKEN) as error:
            connection.send(group.Broken(form.generation, str(error)))
            return None
        self._incarnation = form.generation.incarnation
        connection.send(group.Formed(form.generation))
        return membership

    def _step(
        self,
        connection: Connection,
        membership: Membership | None,
        step: group.Step,
        payload: Payload | NoMemory,
        received: float,
    ) -> None:
        if membership is None or membership.lifetime.generation != step.generation or membership.lifetime.ended:
            return
        try:
            membership.run(step, payload, received)
        except GenerationEnded:
            return
        except BROKEN as error:
            logger.warning("rank %d: step %d: %s", self._request.rank, step.step, error)
            # Nothing more is run in a broken generation: its steps are no longer the same everywhere.
            membership.lifetime.end()
            connection.send(group.Broken(step.generation, f"{type(error).__name__}: {error}"))


def check_collectives(device: str, config: ShardConfig) -> None:
    """StartError where ranks would have to exchange tensors between CUDA devices without NCCL."""
    if config.tensor_parallel_size > 1 and not device.startswith("cpu") and not torch.distributed.is_nccl_available():
        raise StartError(
            f"rank {config.rank}: device {device}: the torch that is installed ({torch.__version__}) has no NCCL, by "
            f"which the {config.tensor_parallel_size} ranks of a tensor-parallel group on CUDA devices work together"
        )


def _take_device(request: ForkRequest) -> None:
    """Makes it the one that this thread uses, which loads and takes the steps. StartError, never the CPU instead."""
    kind, _, number = request.device.partition(":")
    if kind != "cuda":
        return
    if not torch.cuda.is_available():
        raise StartError(f"rank {request.rank}: device {request.device}: CUDA is not available on this host")
    count = torch.cuda.device_count()
    if int(number) >= count:
        raise StartError(f"rank {request.rank}: device {request.device}: this host has {count}, counted from 0")
    # Otherwise torch takes memory on device 0 for whatever names no device, in each agent of the host. This holds for
    # this thread (cudaSetDevice is per thread). Other threads touch devices only through their tensors, and pinning
    # memory uses a device that has a context already.
    torch.cuda.set_device(request.device)


class OrderReader:
    """The thread that reads the Worker's connection: queues its orders, and ends a generation's waits out of band. It
    answers itself what was recorded: steps go on meanwhile."""

    def __init__(self, connection: Connection, orders: queue.SimpleQueue[Order | None], timeline: Timeline) -> None:
        self._connection = connection
        self._orders = orders
        self._timeline = timeline
        self._lifetime: Lifetime | None = None

    def read(self) -> None:
        """Until the connection ends; then the waits end, and None is queued."""
        try:
            while True:
                try:
                    # Without a name here, which would hold the last payload while this waits.
                    self._take(*self._connection.receive())
                except NoMemory as error:
                    # In its turn: the step fails here, and is drained like any that raises.
                    self._take(error.message, error)
        except (OSError, EOFError, FrameError) as error:
            logger.info("the Worker's connection ends: %s", error)
        finally:
            if self._lifetime is not None:
                self._lifetime.end()
            self._orders.put(None)

    def _take(self, message: group.ToAgent, payload: Payload | NoMemory) -> None:
        came = time.monotonic()
        match message:
            case group.AskTimes(request=request):
                # On its own and first: the Worker takes the time that it was under way for its error.
                self._connection.send(group.Clock(request, came))
                self._connection.send(group.Times(request, self._timeline.times()))
                return
            case group.FailureNoted() | group.StoreReply():
                if self._lifetime is not None and self._lifetime.generation == message.generation:
                    self._lifetime.answer(message)
                return
            case group.Form(generation=generation):
                self._lifetime = Lifetime(generation)
            case group.End(generation=generation):
                if self._lifetime is not None and self._lifetime.generation == generation:
                    self._lifetime.end()
            case group.Exit():
                if self._lifetime is not None:
                    self._lifetime.end()
        self._orders.put((message, payload, self._lifetime if isinstance(message, group.Form) else None, came))
