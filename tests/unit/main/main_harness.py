"""A real Main process under a scripted launcher, and scripted Workers on real abstract Unix sockets."""

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys

import numpy as np
from ports import free_port

from shardserve.client import AsyncClient
from shardserve.wire.messages import Generation, front, launch
from shardserve.wire.stream import FrameStream

_names = itertools.count()
X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Launcher:
    """Starts Main and gives it orders: `async with Launcher() as launcher`."""

    async def __aenter__(self):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-X", "dev", "-m", "shardserve.main", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.setblocking(False)
        self._answers = {}
        self._orders = itertools.count(1)
        self.lost = asyncio.Event()
        self._stream = FrameStream(launch.ToLauncher, self._on_frame, self._on_lost)
        await asyncio.get_running_loop().create_unix_connection(lambda: self._stream, sock=ours)
        return self

    async def __aexit__(self, *error):
        self._stream.abort()
        await asyncio.to_thread(self.process.wait, 30)

    def _on_frame(self, message, payload):
        self._answers.pop(message.order).set_result(message)

    def _on_lost(self, reason):
        self.lost.set()

    def give(self, kind, *fields):
        """Sends an order, returns the future of its answer."""
        number = next(self._orders)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._stream.send(kind(number, *fields))
        return self._answers[number]

    async def order(self, kind, *fields):
        """Sends an order that must be answered by Done."""
        answer = await self.give(kind, *fields)
        assert isinstance(answer, launch.Done), answer
        return answer

    async def grpc(self, max_mb=100, tls=None):
        address = f"127.0.0.1:{free_port()}"
        await self.order(launch.StartGrpc, address, max_mb, tls)
        return address

    async def rest(self, max_mb=100, tls=None):
        address = f"127.0.0.1:{free_port()}"
        await self.order(launch.StartRest, address, max_mb, tls)
        return address

    def end_stream(self):
        self._stream.abort()


def announce(name="echo", version=1, state="ready", methods=None, reason="", counter=1):
    ranks = (front.RankStatus(0, 0, "127.0.0.1", "cpu", 4242, "serving"),)
    replicas = (front.ReplicaStatus(0, Generation(1, counter), "serving", 0, ranks),)
    methods = methods or {"predict": front.MethodInfo(("x",), ("x",))}
    return front.Announce(name, version, state, reason, 1, 1, methods, replicas)


def echo(worker, message, payload):
    """Answers each request with its inputs."""
    if isinstance(message, front.Infer):
        results = [front.InstanceOutputs(instance) for instance in message.instances]
        worker.send(front.Reply(message.request, results), [memoryview(payload)] if len(payload) else [])


def keep(worker, message, payload):
    """Answers nothing."""


class Worker:
    """One servable's listener and the Worker incarnations behind it, one at a time.

    `frames` is a queue of what came; `script(worker, message, payload)` sees each of them first.
    """

    def __init__(self, script=echo, greeting=None):
        self.address = f"shardserve-test-{os.getpid()}-{next(_names)}"
        self.script = script
        self.greeting = greeting or announce()
        self.frames = asyncio.Queue()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind("\0" + self.address)
        self.listener.listen(16)
        self.listener.setblocking(False)
        self.lost = asyncio.Event()
        self._stream = None

    async def start(self):
        """A new incarnation: accepts Main's connection and announces itself."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        self.lost = asyncio.Event()
        lost = self.lost
        self._stream = FrameStream(front.ToWorker, self._on_frame, lambda reason: lost.set(), share=True)
        await asyncio.get_running_loop().create_unix_connection(lambda: self._stream, sock=connection)
        if self.greeting is not None:
            self.send(self.greeting)

    def send(self, message, buffers=()):
        self._stream.send(message, buffers)

    async def next(self, kind):
        """The next message that came, which must be of this kind."""
        message = await asyncio.wait_for(self.frames.get(), 10)
        assert isinstance(message, kind), message
        return message

    async def die(self):
        self._stream.abort()
        await self.lost.wait()

    def _on_frame(self, message, payload):
        self.frames.put_nowait(message)
        self.script(self, message, payload)


@contextlib.asynccontextmanager
async def attached(launcher, *workers):
    """Attaches the Workers to Main; returns once Main knows what they announced."""
    for worker in workers:
        attach = launch.Attach, worker.greeting.name, worker.greeting.version, worker.address
        await launcher.order(*attach)
        await worker.start()
        # Answered after Main has read what came before it, the Worker's Announce.
        await launcher.order(*attach)
    yield
    for worker in workers:
        worker.listener.close()


def predict(test):
    """Runs `test(launcher, worker, client, address)` with an attached echo Worker."""

    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc()
            client = AsyncClient(address, "echo", "predict", raise_errors=True)
            async with attached(launcher, worker), client:
                await test(launcher, worker, client, address)

    asyncio.run(run())
