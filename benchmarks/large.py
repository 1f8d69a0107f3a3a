"""`make bench-large`: 256 MB from Main's input buffer to the agent and back, beside memcpy of the same bytes twice.

The benchmark takes Main's place: it is a second Main at a real Worker, so that gRPC and protobuf are left out. The
whole call through the real Main is printed beside it. The servable negates its input.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.load import predict, predict_request
from benchmarks.report import Row, machine, report
from benchmarks.servers import Up, up, write_servable
from shardserve.export import Plan, export
from shardserve.main.servable import ServableVersion
from shardserve.settings import Settings
from shardserve.wire.messages import TensorMeta

NUMBERS = 64 << 20
ROUNDS = 9
GOAL = 4.0


class Negate(nn.Module):
    """x float32 [n] → -x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


def front_address(server: Up) -> str:
    """Where the Worker listens for Main: a name of its launcher's among the abstract sockets (proc(5), net/unix)."""
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@shardserve" in line]
    [name] = {name[1:] for name in names if name.startswith(f"@shardserve-front-{server.process.pid}-")}
    return name


def two_copies(data: npt.NDArray[Any]) -> float:
    """Seconds of copying the bytes into one buffer and from there into another, both warm."""
    first, second = np.ones_like(data), np.ones_like(data)
    start = time.perf_counter()
    np.copyto(first, data)
    np.copyto(second, first)
    return time.perf_counter() - start


async def through_worker(address: str, data: npt.NDArray[Any]) -> list[float]:
    """Seconds from the input buffer to the agent and back into an output buffer, for each round."""
    settings = Settings()
    ready = asyncio.Event()

    def changed() -> None:
        if servable.state == "ready":
            ready.set()

    servable = ServableVersion("negate", 1, settings, changed)
    await servable.attach(address)
    await asyncio.wait_for(ready.wait(), 30)
    meta = TensorMeta("float32", data.shape, data.nbytes)
    output = np.ones_like(data)
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        [result] = await servable.infer("predict", [{"x": meta}], [data.view(np.uint8).reshape(-1).data], None)
        if not isinstance(result, tuple):
            raise result
        np.copyto(output.view(np.uint8), result[1][0])
        took.append(time.perf_counter() - start)
        del result
    if output[0] != -data[0] or output[-1] != -data[-1]:
        raise AssertionError("a wrong answer")
    servable.close()
    return took


def measure(folder: Path) -> list[Row]:
    x = torch.ones(8)
    dims = {"dynamic_shapes": {"x": {0: torch.export.Dim("n", min=1, max=1 << 28)}}, "output_names": ["y"]}
    export(Negate(), (x,), name="negate", out=folder / "model", tensor_parallel=1, plan=Plan({}), **dims)  # type: ignore[arg-type]
    write_servable(folder, "negate", "x", "y", rank_size=1, stage_size=1, with_batch_dim=False)
    data = np.random.default_rng(1).random(NUMBERS, np.float32)
    floors = [two_copies(data) for _ in range(ROUNDS)]
    with up(folder, "negate", "--max-msg-mb-size", "512") as server:
        ours = asyncio.run(through_worker(front_address(server), data))
        call = predict(server.grpc, predict_request("negate", [{"x": data}]))
        whole = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            whole.append(time.perf_counter() - start)
    floors += [two_copies(data) for _ in range(ROUNDS)]
    floor, mine = statistics.median(floors) * 1e3, statistics.median(ours) * 1e3
    return [
        Row("256 MB to the agent and back, without gRPC; floor: memcpy twice", "ms", floor, mine, GOAL),
        Row("the whole gRPC call", "ms", floor, statistics.median(whole) * 1e3),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("large", measure(Path(name)), machine())
