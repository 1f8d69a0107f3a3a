"""Closed loops of clients: one that measures each call, and several that keep a server busy."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceStub

Call = Callable[[], Any]
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def times(call: Call, count: int, pause: float = 0.0) -> list[float]:
    """Seconds of each of `count` calls, one after the other, with so many seconds before each."""
    took = []
    for _ in range(count):
        if pause:
            time.sleep(pause)
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return took


def interleaved_p50(calls: dict[str, Call], rounds: int, count: int, pause: float = 0.0) -> dict[str, float]:
    """For each, the median over the rounds of the median seconds of `count` calls; in turns, after a warm-up."""
    for call in calls.values():
        times(call, count)
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            medians[name].append(statistics.median(times(call, count, pause)))
    return {name: statistics.median(values) for name, values in medians.items()}


def throughput(make: Callable[[], Call], clients: int, seconds: float) -> float:
    """Calls a second of so many threads, each with a call of its own. An error in one ends the run with it."""
    counts, errors = [0] * clients, []
    stop = threading.Event()

    def run(number: int, call: Call) -> None:
        try:
            while not stop.is_set():
                call()
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - it is raised below
            errors.append(error)

    calls = [make() for _ in range(clients)]
    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    done, took = sum(counts), time.perf_counter() - start
    stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done / took


def interleaved_throughput(
    makes: Mapping[str, Callable[[], Call]], rounds: int, clients: int, seconds: float
) -> dict[str, float]:
    """For each, the median over the rounds of its calls a second; in turns, after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in makes}
    for make in makes.values():
        throughput(make, clients, seconds / 3)
    for _ in range(rounds):
        for name, make in makes.items():
            rates[name].append(throughput(make, clients, seconds))
    return {name: statistics.median(values) for name, values in rates.items()}


def drive(address: str, requests: Sequence[pb.PredictRequest], in_flight: int, seconds: float) -> float:
    """Answers a second of a server that always has so many of these requests, sent in turn from one event loop. An
    error in a reply is raised."""
    end = time.perf_counter() + seconds
    source = itertools.takewhile(lambda _: time.perf_counter() < end, itertools.cycle(requests))
    return asyncio.run(_drive(address, source, in_flight))


async def drive_count(address: str, requests: Sequence[pb.PredictRequest], in_flight: int, count: int) -> float:
    """As `drive`, until so many requests were answered; inside a running event loop."""
    return await _drive(address, itertools.islice(itertools.cycle(requests), count), in_flight)


async def _drive(address: str, requests: Iterator[pb.PredictRequest], in_flight: int) -> float:
    async with channel_to(address) as channel:
        return await drive_over(channel, requests, in_flight)


def channel_to(address: str) -> grpc.aio.Channel:
    """Without limits of sizes."""
    return grpc.aio.insecure_channel(address, UNLIMITED)


async def drive_over(channel: grpc.aio.Channel, requests: Iterator[pb.PredictRequest], in_flight: int) -> float:
    """Answers a second, until there are no more requests."""
    stub = MSServiceStub(channel)
    done = 0

    async def client() -> None:
        nonlocal done
        for request in requests:
            reply = await stub.Predict(request)
            if reply.error_msg:
                raise RuntimeError(reply.error_msg[0].error_msg.decode())
            done += 1

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    return done / (time.perf_counter() - start)


def predict_request(servable: str, inputs: Sequence[dict[str, npt.NDArray[Any]]]) -> pb.PredictRequest:
    """A request that is built once, of one instance per dict; arrays are float32, int64 or bool."""
    types = {"float32": pb.MS_FLOAT32, "int64": pb.MS_INT64, "bool": pb.MS_BOOL}
    instances = [
        pb.Instance(
            items={
                name: pb.Tensor(shape=pb.TensorShape(dims=a.shape), dtype=types[a.dtype.name], data=a.tobytes())
                for name, a in instance.items()
            }
        )
        for instance in inputs
    ]
    return pb.PredictRequest(servable_spec=pb.ServableSpec(name=servable, method_name="predict"), instances=instances)


def predict(address: str, request: pb.PredictRequest) -> Call:
    """Sends the request on a channel of its own and reads the first output; an error in the reply is raised."""
    stub = MSServiceStub(grpc.insecure_channel(address, UNLIMITED))

    def call() -> npt.NDArray[Any]:
        reply = stub.Predict(request)
        if reply.error_msg:
            raise RuntimeError(reply.error_msg[0].error_msg.decode())
        tensor = next(iter(reply.instances[0].items.values()))
        return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape.dims)

    return call


def matmul_request() -> pb.PredictRequest:
    return predict_request("matmul", [{"x": np.ones((128, 96), np.float32)}])


def check_matmul(call: Call) -> None:
    if not (call() == -48).all():
        raise AssertionError("a wrong answer")
