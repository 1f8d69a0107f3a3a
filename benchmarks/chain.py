"""The floor of our chain of processes: Main, Worker and agent as bare as they can be, with the work of the matmul.

`python -m benchmarks.chain front` serves on a free port of 127.0.0.1, prints it, ends with its standard input. It
decodes and encodes the same messages as the bare echo, and has a process that only passes frames on (of a length and
so many bytes) to one that multiplies. The event loop is ours, and what each process does about a request is nothing
else: no names, no checks, no batches, no steps, no deadlines, no recovery, one request after the other.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import uvloop

from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceServicer, add_MSServiceServicer_to_server

LENGTH = struct.Struct("<I")
LARGEST = 1 << 17
SHAPE, WEIGHT = (128, 96), np.full((96, 16), -0.5, np.float32)


class Frames(asyncio.BufferedProtocol):
    """Frames of both directions of one connection."""

    def __init__(self, on_frame: Callable[[bytes], None]) -> None:
        self._on_frame = on_frame
        self._buffer = bytearray(LARGEST)
        self._held = 0
        self.ended = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._held :]

    def buffer_updated(self, nbytes: int) -> None:
        self._held += nbytes
        if self._held < LENGTH.size:
            return
        end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
        if self._held >= end:
            frame = bytes(memoryview(self._buffer)[LENGTH.size : end])
            self._held = 0
            self._on_frame(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def send(self, frame: bytes) -> None:
        self._transport.writelines([LENGTH.pack(len(frame)), frame])


async def connect(connection: socket.socket, on_frame: Callable[[bytes], None]) -> Frames:
    frames = Frames(on_frame)
    await asyncio.get_running_loop().create_unix_connection(lambda: frames, sock=connection)
    return frames


async def relay(front: socket.socket, back: socket.socket) -> None:
    """The Worker's place."""
    before = await connect(front, lambda frame: after.send(frame))
    after = await connect(back, lambda frame: before.send(frame))
    await before.ended.wait()


def multiply(connection: socket.socket) -> None:
    """The agent's place."""
    import torch

    torch.set_num_threads(1)
    weight = torch.from_numpy(WEIGHT)
    with torch.inference_mode(), connection.makefile("rb") as source:
        while header := source.read(LENGTH.size):
            x = torch.frombuffer(bytearray(source.read(LENGTH.unpack(header)[0])), dtype=torch.float32)
            y = (x.reshape(SHAPE) @ weight).numpy().tobytes()
            connection.sendall(LENGTH.pack(len(y)) + y)


class Chain(MSServiceServicer):
    """Main's place."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()

    async def connect(self, connection: socket.socket) -> None:
        self._frames = await connect(connection, lambda frame: self._waiting.popleft().set_result(frame))

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictReply:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._frames.send(request.instances[0].items["x"].data)
        shape = pb.TensorShape(dims=(SHAPE[0], WEIGHT.shape[1]))
        y = pb.Tensor(shape=shape, dtype=pb.MS_FLOAT32, data=await answer)
        return pb.PredictReply(servable_spec=request.servable_spec, instances=[pb.Instance(items={"y": y})])


async def front(connection: socket.socket) -> None:
    chain = Chain()
    await chain.connect(connection)
    server = grpc.aio.server()
    add_MSServiceServicer_to_server(chain, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def start(role: str, *connections: socket.socket) -> subprocess.Popen[bytes]:
    """A process that has these connections for itself."""
    numbers = [connection.fileno() for connection in connections]
    command = [sys.executable, "-m", "benchmarks.chain", role, *map(str, numbers)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers)
    for connection in connections:
        connection.close()
    return process


def main(role: str, *numbers: str) -> None:
    if role == "front":
        (mine, worker_front), (worker_back, agent) = socket.socketpair(), socket.socketpair()
        processes = [start("relay", worker_front, worker_back), start("multiply", agent)]
        uvloop.run(front(mine))
        mine.close()
        for process in processes:
            process.wait()
        return
    connections = [socket.socket(fileno=int(number)) for number in numbers]
    if role == "relay":
        uvloop.run(relay(*connections))
    else:
        multiply(*connections)


if __name__ == "__main__":
    main(*sys.argv[1:])
