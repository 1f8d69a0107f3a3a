"""Closed loops of clients: each sends its next request when it has the answer to the last one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from shardserve.client import SSLConfig, channel, codec
from shardserve.errors import ShardserveError, Unavailable
from shardserve.wire.stubs import ms_service_pb2 as pb

PREDICT = "/mindspore.serving.proto.MSService/Predict"
PERCENTILES = (50, 90, 99)

PAUSE = 0.1
"""Seconds that a client waits after a call that could not be served: such a call fails at once, and clients that try
again at once are busy with nothing else."""

GIVE_UP = 10.0
"""Seconds with nothing but such calls, after which the load ends. A server that is respawned is back before."""


def one_line(error: ShardserveError) -> str:
    """Its text, which the server's model may have given line breaks."""
    return " ".join(str(error).split())


@dataclass
class Level:
    """What one number of clients got. latencies: of the good answers, in seconds. errors: class name → requests, those
    of the warm-up included; first_error is one line. seconds: how long was measured. client_cpu: what this process
    itself used meanwhile, in cores. given_up: it ended early."""

    concurrency: int
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str | None = None
    seconds: float = 0.0
    client_cpu: float = 0.0
    given_up: bool = False

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def summary(self, instances: int) -> dict[str, Any]:
        """As JSON has it; latencies in milliseconds, None without any. instances: in a request."""
        names = ["mean", "min", *(f"p{percent}" for percent in PERCENTILES), "max"]
        figures: list[float | None] = [None] * len(names)
        if self.latencies:
            taken = np.array(self.latencies) * 1e3
            figures = [taken.mean(), taken.min(), *np.percentile(taken, PERCENTILES), taken.max()]
        return {
            "concurrency": self.concurrency,
            "requests": len(self.latencies),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(self.rate, 3),
            "instances_per_second": round(self.rate * instances, 3),
            "latency_ms": {
                name: None if figure is None else round(float(figure), 4)
                for name, figure in zip(names, figures, strict=True)
            },
            "errors": sum(self.errors.values()),
            "errors_by_class": dict(self.errors),
            "first_error": self.first_error,
            "client_cpu": round(self.client_cpu, 3),
        }


class Load:
    """Clients on one channel in one event loop. The requests are built and encoded beforehand, of the answers only
    the errors are looked at: what the clients cost themselves is not the server's."""

    def __init__(self, connection: grpc.aio.Channel, requests: Sequence[pb.PredictRequest], timeout: float) -> None:
        self._call = connection.unary_unary(PREDICT, None, pb.PredictReply.FromString)
        self._requests = [request.SerializeToString() for request in requests]
        self._timeout = channel.seconds(timeout)
        self._away_since: float | None = None

    @property
    def _given_up(self) -> bool:
        return self._away_since is not None and time.perf_counter() - self._away_since > GIVE_UP

    async def send(self, request: bytes) -> ShardserveError | None:
        """One request; its error, the first one if several of its instances have one."""
        try:
            reply: pb.PredictReply = await self._call(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            return codec.from_rpc(error)
        return codec.first_error(reply) if reply.error_msg else None

    async def check(self) -> None:
        """Each of the requests once. Raises what the server has against it."""
        for request in self._requests:
            error = await self.send(request)
            if error is not None:
                raise error

    async def run(self, concurrency: int, warmup: float, seconds: float) -> Level:
        """So many clients, for `seconds` after a warm-up of the same kind: counted is what is answered in that time. It
        ends early, `given_up`, after GIVE_UP seconds of nothing but Unavailable."""
        level = Level(concurrency)
        begin = time.perf_counter() + warmup
        end = begin + seconds
        # Shared, so that different requests are under way at the same time.
        source = itertools.cycle(self._requests)
        cpu: list[float] = []
        asyncio.get_running_loop().call_later(warmup, lambda: cpu.append(time.process_time()))
        await asyncio.gather(*(self._client(source, begin, end, level) for _ in range(concurrency)))
        level.given_up = self._given_up
        level.seconds = max(0.0, min(end, time.perf_counter()) - begin)
        level.client_cpu = (time.process_time() - cpu[0]) / (time.perf_counter() - begin) if cpu else 0.0
        return level

    async def _client(self, source: Iterator[bytes], begin: float, end: float, level: Level) -> None:
        while (sent := time.perf_counter()) < end and not self._given_up:
            error = await self.send(next(source))
            answered = time.perf_counter()
            if not isinstance(error, Unavailable):
                self._away_since = None
            elif self._away_since is None:
                self._away_since = answered
            if error is not None:
                level.errors[type(error).__name__] += 1
                level.first_error = level.first_error or one_line(error)
                if isinstance(error, Unavailable):
                    await asyncio.sleep(max(0.0, min(PAUSE, end - answered)))
            elif begin <= answered < end:
                level.latencies.append(answered - sent)


@asynccontextmanager
async def loaded(
    address: str, ssl_config: SSLConfig | None, requests: Sequence[pb.PredictRequest], timeout: float
) -> AsyncIterator[Load]:
    """A Load that is connected when it is entered and has a good answer to each request; ShardserveError if not."""
    async with channel.connect_async(address, ssl_config) as connection:
        load = Load(connection, requests, timeout)
        await load.check()
        yield load
