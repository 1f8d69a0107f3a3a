"""`make bench-front`: requests a second of a trivial servable at 32 clients, beside bare servers of the same stacks."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.load import Call, check_matmul, interleaved_throughput, matmul_request, predict
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import echo, up

CLIENTS = 32
ROUNDS = 5
SECONDS = 3.0
GOAL = 0.7
BODY = json.dumps({"instances": {"x": np.ones((128, 96)).tolist()}}).encode()


def rest(address: str) -> Call:
    """A call over a connection of its own, kept open."""
    connection = http.client.HTTPConnection(address)

    def call() -> bytes:
        connection.request("POST", "/model/matmul:predict", BODY, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(content.decode())
        return content

    return call


def measure(folder: Path) -> list[Row]:
    matmul(folder, 1)
    request = matmul_request()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(up(folder, "matmul"))
        addresses = {kind: stack.enter_context(echo(kind)) for kind in ("sync", "aio", "rest")}
        check_matmul(predict(server.grpc, request))

        def grpc(address: str) -> Callable[[], Call]:
            return lambda: predict(address, request)

        makes = {"sync": grpc(addresses["sync"]), "aio": grpc(addresses["aio"]), "ours": grpc(server.grpc)}
        rates = interleaved_throughput(makes, ROUNDS, CLIENTS, SECONDS)
        over_rest = {"floor": lambda: rest(addresses["rest"]), "ours": lambda: rest(server.rest)}
        rest_rates = interleaved_throughput(over_rest, ROUNDS, CLIENTS, SECONDS)
    floor = max(rates["sync"], rates["aio"])
    rest_floor = rest_rates["floor"]
    return [
        Row(f"gRPC, {CLIENTS} clients; floor: bare echo", "req/s", floor, rates["ours"], at_least=GOAL),
        Row(f"REST, {CLIENTS} clients; floor: bare app", "req/s", rest_floor, rest_rates["ours"], at_least=GOAL),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("front", measure(Path(name)), machine())
