"""A Worker by script: the real addresses and frames, decisions by the test."""

import asyncio
import contextlib
import logging
import resource
from concurrent.futures import Future

import numpy as np

from shardserve.agent.supervisor.slots import HostOptions
from shardserve.agent.supervisor.supervisor import Supervisor
from shardserve.settings import Settings
from shardserve.wire.frames import padded
from shardserve.wire.messages import Generation, group
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name
from shardserve.wire.stream import FrameStream

HOST = "127.0.0.1"


@contextlib.contextmanager
def no_descriptors_left(above=3):
    """This process can open nothing that would get a number from this one on."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (above, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def logged(text):
    """An event that is set when a message of ours with this text is logged, in the event loop's thread."""

    class Listener(logging.Handler):
        def emit(self, record):
            if text in record.getMessage():
                event.set()

    event, listener = asyncio.Event(), Listener()
    logging.getLogger("shardserve").addHandler(listener)
    try:
        yield event
    finally:
        logging.getLogger("shardserve").removeHandler(listener)


class Peer:
    """A supervisor's or an agent's connection. It has arrived when it says something: who finds the TCP listener before
    its local twin is there leaves without a word."""

    def __init__(self, worker):
        worker.peers.append(self)
        self._worker = worker
        self._arrived = False
        self.frames = asyncio.Queue()
        self.lost = asyncio.Event()
        self.payload = None
        self.stream = FrameStream(
            group.FromGroup,
            self._frame,
            lambda _: self.lost.set(),
            share=True,
        )

    def _frame(self, *frame):
        self.frames.put_nowait(frame)
        if not self._arrived:
            self._arrived = True
            self._worker.arrived.put_nowait(self)

    async def next(self, kind):
        """The next message, which must be of this kind."""
        message, self.payload = await self.frames.get()
        assert isinstance(message, kind), message
        return message

    def send(self, message, *buffers):
        self.stream.send(message, buffers)


class ScriptedWorker:
    """`async with`; may be closed and opened again, as a Worker that is respawned."""

    def __init__(self, port, rank_size, stage_size=1, hosts=(HOST,)):
        self.address = Address(HOST, port)
        self.sizes = rank_size, stage_size
        self.hosts = hosts
        self.arrived = asyncio.Queue()
        self.peers = []

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        listeners = listen_tcp(self.address, "test"), listen_abstract(twin_name(self.address))
        self._servers = [await loop.create_server(lambda: Peer(self).stream, sock=each) for each in listeners]
        return self

    async def __aexit__(self, *error):
        for server in self._servers:
            server.close()
        for peer in self.peers:
            peer.stream.abort()
            await peer.lost.wait()
        self.peers.clear()

    async def introduced(self):
        """The next connection, which must be a supervisor's, and its Enlist."""
        peer = await self.arrived.get()
        await peer.next(group.Introduce)
        peer.send(group.Roster(self.hosts))
        return peer, await peer.next(group.Enlist)

    async def supervisor(self, *ranks, devices=None):
        """A supervisor that is given these ranks."""
        peer, _ = await self.introduced()
        devices = devices or tuple(str(rank) for rank in ranks)
        peer.send(group.Enlisted(ranks, devices, HOST, *self.sizes, "net", 1))
        return peer

    async def agents(self, count):
        """The next connections, which must be those of agents, in the order of their ranks."""
        registered = []
        for _ in range(count):
            peer = await self.arrived.get()
            peer.register = await peer.next(group.Register)
            peer.send(group.Registered(1))
            registered.append(peer)
        return sorted(registered, key=lambda peer: peer.register.rank)

    async def ready(self, host, *ranks):
        """The supervisor and the agents of a host that is given these ranks; all agents are registered."""
        supervisor = await self.supervisor(*ranks)
        agents = await self.agents(len(ranks))
        supervisor.send(group.HostReady())
        await host.ready
        return supervisor, agents

    async def form(self, agents, counter=1):
        """A generation of all these agents; returns it when all have formed."""
        generation = Generation(1, counter)
        await formed(self.order_form(agents, generation), agents)
        return generation

    def order_form(self, agents, generation):
        rank_size, stage_size = self.sizes
        per_stage = rank_size // stage_size
        for agent in agents:
            after = agent.register.rank + per_stage
            address = agents[after].register.stage_address if after < rank_size else None
            agent.send(group.Form(generation, "shared_memory", address))
        return generation


async def formed(generation, agents):
    for agent in agents:
        assert await agent.next(group.Formed) == group.Formed(generation)


def send_step(agents, generation, number, x, stage_ranks=None):
    """The inputs go to the ranks of the first stage."""
    data = x.tobytes().ljust(padded(x.nbytes), b"\0")
    for i, agent in enumerate(agents):
        step = group.Step(generation, number, 0, {"batch": len(x)})
        agent.send(step, *([data] if i < (stage_ranks or len(agents)) else []))


def output(peer, shape):
    """The tensor of an Output that the peer has just sent."""
    return np.frombuffer(peer.payload, np.float32)[: int(np.prod(shape))].reshape(shape)


class Host:
    """A supervisor in this loop: `ready` is the future of what startup_agents waits for."""

    def __init__(self, worker_port, model_files, start_port, configs=None, agent_ip=None, rank_start=None, **settings):
        options = HostOptions(
            distributed_address=f"{HOST}:{worker_port}",
            model_files=tuple((str(file),) for file in model_files),
            group_config_files=tuple((config,) for config in configs or [None] * len(model_files)),
            agent_start_port=start_port,
            agent_ip=agent_ip,
            rank_start=rank_start,
            device_type=None,
        )
        self.ready = asyncio.get_running_loop().create_future()
        ready = Future()
        # At once, not by a turn of the loop later, as asyncio.wrap_future has it.
        ready.add_done_callback(self._on_ready)
        self.supervisor = Supervisor(options, Settings(**settings), ready)

    def _on_ready(self, ready):
        if (error := ready.exception()) is None:
            self.ready.set_result(ready.result())
        else:
            self.ready.set_exception(error)

    async def __aenter__(self):
        self.life = asyncio.ensure_future(self.supervisor.run())
        return self

    async def fork_server(self):
        """The first one; nobody has asked it for anything yet."""
        # With which `run` begins, in the loop's next turn.
        await asyncio.sleep(0)
        assert self.supervisor._agents._fork_server is not None
        return self.supervisor._agents._fork_server

    async def __aexit__(self, *error):
        self.supervisor.stop()
        await self.life
        if self.ready.done():
            self.ready.exception()
