"""Groups of agents that only record what they are sent, under a real scheduler."""

import asyncio
import dataclasses

import numpy as np

from shardserve.servable import Model
from shardserve.settings import Settings
from shardserve.shards.config import DimRange, Signature, TensorSpec
from shardserve.wire.frames import padded
from shardserve.wire.messages import Generation, group
from shardserve.worker.answer import Answer
from shardserve.worker.batching import Batching
from shardserve.worker.calls import Batch, Call
from shardserve.worker.group import AgentHandle, ReplicaGroup
from shardserve.worker.scheduler import Scheduler


class Stream:
    """What an agent is sent."""

    def __init__(self):
        self.sent = []
        self.payloads = []
        self.aborted = False
        self.said = asyncio.Event()

    def send(self, message, buffers=()):
        self.said.set()
        self.sent.append(message)
        self.payloads.append(b"".join(buffers))
        return True

    def abort(self):
        self.aborted = True

    def take(self, kind):
        """All messages of this kind, in order."""
        return [message for message in self.sent if isinstance(message, kind)]

    def clear(self):
        self.sent.clear()
        self.payloads.clear()


def agent(rank, rank_size=2, stage_size=2, host="10.0.0.1"):
    local = rank % rank_size
    stage = local // (rank_size // stage_size)
    return AgentHandle(rank, local, stage, host, "cpu", 1000 + rank, f"{host}:{7000 + rank}", Stream())


class Owner:
    """Records what a group tells it, in order."""

    def __init__(self):
        self.said = []
        self.endings = []
        self.counter = 0

    def next_generation(self):
        self.counter += 1
        return Generation(5, self.counter)

    def group_changed(self):
        self.said.append(("changed",))

    def step_ended(self):
        self.said.append(("step ended",))

    def answered(self, batch, payload):
        self.said.append(("answered", batch, payload))
        return lambda: self.said.append(("delivered",))

    def failed(self, batch, message):
        self.said.append(("failed", batch, message))

    def interrupted(self, batches, ending):
        self.said.append(("interrupted", batches))
        self.endings.append(ending)

    def kill(self, agent, reason):
        self.said.append(("kill", agent.rank, reason))

    def forgive(self, rank):
        self.said.append(("forgive", rank))

    def take(self, what):
        """What was said of this kind, in order."""
        return [fact[1:] for fact in self.said if fact[0] == what]


class Cluster(Owner):
    """Replicas of one rank each, all serving, under a scheduler; x float32 [batch, n] → y float32 [batch, n]."""

    def __init__(self, replicas=1, window=2, batch=4, settings=None, model=None):
        super().__init__()
        settings = settings or Settings()
        self.groups = [ReplicaGroup(r, 1, 1, window, self, settings) for r in range(replicas)]
        self.scheduler = Scheduler(self.groups, settings)
        signature = Signature(
            {"batch": DimRange(1, batch), "n": DimRange(1, 9)},
            (TensorSpec("x", "float32", ("batch", "n")),),
            (TensorSpec("y", "float32", ("batch", "n")),),
        )
        self.batching = Batching(Model(rank_size=1, stage_size=1, **(model or {})), signature)
        self.scheduler.set_models([self.batching])
        self.agents = {}
        for replica in range(replicas):
            self.join(replica)

    def join(self, replica=0):
        """An agent comes and its group serves."""
        replica_group = self.groups[replica]
        newcomer = self.agents[replica] = dataclasses.replace(agent(0, 1, 1), rank=replica)
        replica_group.add(newcomer)
        self.say(group.Formed(replica_group.generation), replica)

    def say(self, message, replica=0, payload=b""):
        self.groups[replica].handle(self.agents[replica], message, np.frombuffer(bytearray(payload), np.uint8))

    async def sent(self, replica=0):
        """Returns when the next message is sent to this replica's agent."""
        stream = self.agents[replica].stream
        stream.said = asyncio.Event()
        await stream.said.wait()

    def steps(self, replica=0):
        """What was sent and not yet taken: (number, the first element of each of its instances)."""
        stream = self.agents[replica].stream
        steps = [
            (message.step, np.frombuffer(payload, np.float32).reshape(message.dims["batch"], -1)[:, 0].tolist())
            for message, payload in zip(stream.sent, stream.payloads, strict=True)
            if isinstance(message, group.Step)
        ]
        stream.clear()
        return steps

    def output(self, number, values, replica=0, n=1):
        """The leader answers with these first elements."""
        y = np.repeat(np.array(values, np.float32)[:, None], n, 1)
        data = y.tobytes().ljust(padded(y.nbytes), b"\0")
        self.say(group.Output(self.groups[replica].generation, number), replica, data)

    def failure(self, number, message="boom", replica=0):
        self.say(group.StepFailed(self.groups[replica].generation, number, message), replica)

    def lose(self, replica=0):
        """Its agent dies; another comes."""
        self.groups[replica].lost(self.agents[replica])
        self.join(replica)

    def call(self, value, n=1, deadline=None):
        x = np.full(n, value, np.float32)
        return Call((x,), self.batching.key((x,)), deadline, Answer())

    def submit(self, value, n=1, deadline=None):
        call = self.call(value, n, deadline)
        self.scheduler.enqueue(call)
        self.scheduler.pump()
        return call

    # As the Worker does.

    def group_changed(self):
        self.scheduler.pump()

    def step_ended(self):
        self.scheduler.pump()

    def answered(self, batch, payload):
        return self.scheduler.answered(batch, payload)

    def failed(self, batch, message):
        self.scheduler.failed(batch, message)

    def interrupted(self, batches, ending):
        self.scheduler.interrupted(batches, ending)


def value(call):
    """The first element of the call's answer."""
    return float(call.answer.result()[0].flat[0])


# Two pipeline stages of two ranks.
SIZES = {"rank_size": 4, "stage_size": 2}
NOTHING = np.empty(0, np.uint8)


class Group:
    """A replica group, its owner and its agents. `serving`: forms at once."""

    def __init__(self, window=3, serving=True, hosts=("10.0.0.1",) * 4, **settings):
        self.owner = Owner()
        self.group = ReplicaGroup(0, 4, 2, window, self.owner, Settings(**settings))
        self.agents = [agent(rank, host=hosts[rank], **SIZES) for rank in range(4)]
        if serving:
            self.join(*range(4))
            self.say(group.Formed, *range(4))
            assert self.group.state == "serving"
            for each in self.agents:
                each.stream.clear()

    @property
    def generation(self):
        return self.group.generation

    def join(self, *ranks):
        for rank in ranks:
            self.group.add(self.agents[rank])

    def lose(self, rank):
        """The agent's connection ends; the next `join` of this rank brings another."""
        lost = self.agents[rank]
        self.agents[rank] = agent(rank, host=lost.host, **SIZES)
        self.group.lost(lost)
        return lost

    def say(self, kind, *ranks, generation=None, payload=NOTHING, **fields):
        for rank in ranks:
            self.group.handle(self.agents[rank], kind(generation or self.generation, **fields), payload)

    def sent(self, kind):
        return [len(each.stream.take(kind)) for each in self.agents]


def batch():
    arrays = (np.arange(6, dtype=np.float32).reshape(2, 3), np.array(True))
    return Batch((), arrays, {"batch": 2})


async def until(condition):
    """Waits for what a timer does."""
    while not condition():
        await asyncio.sleep(0.01)
