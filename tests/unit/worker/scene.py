"""A Worker in this process, and what talks to it: Main, agents, supervisors."""

import asyncio
import json
import os

import numpy as np

from shardserve.settings import Settings
from shardserve.wire.messages import TensorMeta, front, group, launch
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name
from shardserve.wire.stream import FrameStream
from shardserve.worker.worker import Worker

from .harness import Stream
from .test_registry import config

SERVABLE = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1)

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
"""
STATEFUL = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1, stateful=True)

def twice(x):
    return model.call(model.call(x))

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(twice, x, outputs_count=1)
"""
FRONT = f"shardserve-test-front-{os.getpid()}"


class Peer:
    """One side of a connection to the Worker."""

    def __init__(self, union, admission=None):
        self.frames = asyncio.Queue()
        self.lost, self.admitted = asyncio.Event(), asyncio.Event()
        self.stream = FrameStream(
            union,
            lambda *frame: self.frames.put_nowait(frame),
            lambda _: self.lost.set(),
            admission=admission,
            on_admitted=self.admitted.set,
        )

    async def next(self, kind):
        """The next message of this kind; others before it are skipped."""
        while True:
            message, self.payload = await self.frames.get()
            if isinstance(message, kind):
                return message

    def send(self, message, *buffers):
        self.stream.send(message, buffers)


class Scene:
    """A Worker in this process, on real listeners."""

    def __init__(
        self,
        directory,
        port,
        replicas=1,
        wait=0.0,
        incarnation=100,
        servable=SERVABLE,
        secret=None,
        insecure=False,
        was_ready=False,
        **settings,
    ):
        (directory / "net").mkdir(exist_ok=True)
        (directory / "net" / "servable_config.py").write_text(servable)
        devices = [{"device_id": str(r), "device_ip": "a", "rank_id": str(r)} for r in range(2 * replicas)]
        table = {"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}
        (directory / "ranks.json").write_text(json.dumps(table))
        self.launcher = Stream()
        guard = launch.SecurityFiles(secret, insecure=insecure)
        table_file = str(directory / "ranks.json")
        serve = launch.Serve(1, str(directory), "net", 3, table_file, incarnation, wait, guard, was_ready=was_ready)
        self.address = Address("127.0.0.1", port)
        self.worker = Worker(serve, Settings(**settings), self.launcher)
        self.peers = []

    async def __aenter__(self):
        await self.worker.start(
            listen_tcp(self.address, "test"), listen_abstract(twin_name(self.address)), listen_abstract(FRONT)
        )
        return self

    async def __aexit__(self, *error):
        for server in self.worker._servers:
            server.close()
        for peer in self.peers:
            peer.stream.abort()
            await peer.lost.wait()
        # The Worker's sides of the connections see it, too.
        while self.worker._connections or self.worker._mains:
            await asyncio.sleep(0.01)

    async def peer(self, union, name, admission=None):
        peer = Peer(union, admission)
        await asyncio.get_running_loop().create_unix_connection(lambda: peer.stream, "\0" + name)
        self.peers.append(peer)
        return peer

    async def agent(self, rank, shard=None, incarnation=0, device="cpu", pid=None):
        agent = await self.peer(group.ToAgent, twin_name(self.address))
        return self.register(agent, rank, shard, incarnation, device, pid)

    async def agent_by_tcp(self, rank):
        """As from another host."""
        agent = Peer(group.ToAgent)
        await asyncio.get_running_loop().create_connection(lambda: agent.stream, *self.address)
        self.peers.append(agent)
        return self.register(agent, rank)

    @staticmethod
    def register(agent, rank, shard=None, incarnation=0, device="cpu", pid=None):
        shards = [shard or config(rank % 2)]
        pid, address = pid or 1000 + rank, f"127.0.0.1:{7000 + rank}"
        agent.send(group.Register(rank, pid, f"of {pid}", device, incarnation, address, shards))
        return agent

    async def agents(self, *ranks):
        agents = [await self.agent(rank) for rank in ranks]
        for agent in agents:
            form = await agent.next(group.Form)
            agent.send(group.Formed(form.generation))
        return form.generation, agents

    async def main(self):
        return await self.peer(front.ToMain, FRONT)

    async def supervisor(self, count=2):
        supervisor = await self.peer(group.ToSupervisor, twin_name(self.address))
        supervisor.send(group.Introduce(55, "s"))
        roster = await supervisor.next(group.Roster)
        supervisor.send(group.Enlist(roster.hosts, None, None, count))
        return supervisor

    async def said(self, kind):
        """What the launcher was told of this kind."""
        while not self.launcher.take(kind):
            self.launcher.said.clear()
            await self.launcher.said.wait()
        return self.launcher.take(kind)


async def state(main, wanted):
    """The announcement with this state."""
    while (announced := await main.next(front.Announce)).state != wanted:
        pass
    return announced


X = np.array([1, 2, 3], np.float32)
TEXT = np.frombuffer(b"twelve bytes", np.float32)


def infer(number, value=X, method="predict", deadline=None, **names):
    meta = TensorMeta("float32", value.shape, value.nbytes)
    return front.Infer(number, method, [names or {"x": meta}], deadline), value.tobytes()
