"""`make bench-dispatch`: the Worker's CPU time for a step, with 1 to 256 agents that do nothing but answer.

A real Worker and Main; the agents are connections of this process, whose leader sends an output at once. The model is
tensor-parallel over all of them, so each gets the input (16 bytes) and the header of every step.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from benchmarks.load import drive_count, predict_request
from benchmarks.report import Row, machine, report
from benchmarks.servers import free_port, write_servable
from shardserve.shards.config import FORMAT_VERSION, ShardConfig, Signature, TensorSpec
from shardserve.wire.frames import Payload
from shardserve.wire.messages import group
from shardserve.wire.sockets import Address, twin_name
from shardserve.wire.stream import FrameStream

AGENTS = (1, 8, 64, 256)
STEPS = 2000
WARM = 300
LIMIT = 30.0

SCRIPT = """import sys
from shardserve import server
from shardserve.server import distributed

distributed.start_servable(".", "net", "ranks.json", distributed_address=sys.argv[1])
server.start_grpc_server(sys.argv[2])
print("ready", flush=True)
"""


def write_files(folder: Path, agents: int) -> None:
    write_servable(folder, "net", "x", "y", rank_size=agents, stage_size=1, with_batch_dim=False)
    devices = [{"device_id": str(r), "device_ip": "127.0.0.1", "rank_id": str(r)} for r in range(agents)]
    table = {"version": "1.0", "server_count": "1", "status": "completed"}
    servers = [{"server_id": "127.0.0.1", "host_nic_ip": "reserve", "device": devices}]
    (folder / "ranks.json").write_text(json.dumps({**table, "server_list": servers}))
    (folder / "server.py").write_text(SCRIPT)


def config(rank: int, agents: int) -> dict[str, object]:
    x, y = TensorSpec("x", "float32", (4,)), TensorSpec("y", "float32", (4,))
    return ShardConfig(
        format_version=FORMAT_VERSION,
        export_id="stub",
        name="net",
        rank_size=agents,
        stage_size=1,
        rank=rank,
        signature=Signature({}, (x,), (y,)),
        receives=(x,),
        sends=(y,),
        graph_file="net.graph.json",
        graph_sha256="0" * 64,
        weights_file="weights.safetensors",
        weights_sha256="0" * 64,
        parameter_bytes=0,
    ).to_dict()


class StubAgent:
    """Joins every generation, and answers every step if it is the leader."""

    def __init__(self, rank: int, agents: int) -> None:
        self._rank = rank
        self._agents = agents
        self._output = np.zeros(64, np.uint8).data
        self.stream: FrameStream[group.ToAgent] = FrameStream(group.ToAgent, self._frame, lambda _: None)

    def register(self) -> None:
        address = f"127.0.0.1:{10000 + self._rank}"
        configs = [config(self._rank, self._agents)]
        self.stream.send(group.Register(self._rank, os.getpid(), "stub", "cpu", 0, address, configs))

    def _frame(self, message: group.ToAgent, payload: Payload) -> None:
        match message:
            case group.Form(generation=generation):
                self.stream.send(group.Formed(generation))
            case group.Step(generation=generation, step=step) if self._rank == 0:
                self.stream.send(group.Output(generation, step), [self._output])
            case group.Refuse(message=text):
                raise RuntimeError(text)


async def cpu_of_a_step(folder: Path, agents: int) -> float:
    """Microseconds of CPU that the Worker takes for a step."""
    write_files(folder, agents)
    distributed, grpc = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [sys.executable, str(folder / "server.py"), distributed, grpc]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    stubs: list[StubAgent] = []
    try:
        await join(stubs, distributed, agents)
        if (await process.stdout.readline()).strip() != b"ready":
            raise RuntimeError("the server did not get ready")
        family = psutil.Process(process.pid).children(recursive=True)
        [worker] = [child for child in family if "shardserve.worker" in child.cmdline()]
        request = predict_request("net", [{"x": np.zeros(4, np.float32)}])
        await drive_count(grpc, [request], 1, WARM)
        before = worker.cpu_times()
        await drive_count(grpc, [request], 1, STEPS)
        after = worker.cpu_times()
    finally:
        process.terminate()
        await process.wait()
        for stub in stubs:
            stub.stream.abort()
    return (after.user + after.system - before.user - before.system) / STEPS * 1e6


async def join(stubs: list[StubAgent], distributed: str, agents: int) -> None:
    loop = asyncio.get_running_loop()
    host, _, port = distributed.rpartition(":")
    name = "\0" + twin_name(Address(host, int(port)))
    for rank in range(agents):
        stub = StubAgent(rank, agents)
        while True:
            try:
                await loop.create_unix_connection(lambda stub=stub: stub.stream, name)  # type: ignore[misc]
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)  # A listener that isn't there yet is no event to wait for.
        stub.register()
        stubs.append(stub)


def measure(folder: Path) -> list[Row]:
    costs: dict[int, float] = {}
    for agents in AGENTS:
        costs[agents] = asyncio.run(cpu_of_a_step(folder / str(agents), agents))
    base, most = costs[AGENTS[0]], AGENTS[-1]
    rows = [Row(f"Worker CPU of a step, {agents} agents", "us", None, cost) for agents, cost in costs.items()]
    each = (costs[most] - base) / (most - 1)
    return [*rows, Row(f"for each agent beyond the first, of {most}", "us", None, each, LIMIT)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("dispatch", measure(Path(name)), machine())
