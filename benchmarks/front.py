"""`make bench-front`: requests a second of a trivial servable at 32 clients, beside bare servers of the same stacks.

Once as a servable that has to make a step of each request (`with_batch_dim=False`), once as one whose requests share
steps.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.load import Call, check_matmul, interleaved_throughput, matmul_request, predict
from benchmarks.models import matmul, matmul_of_batches
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
    matmul(folder / "single", 1)
    matmul_of_batches(folder / "batches", CLIENTS)
    request = matmul_request()
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(up(folder / name, "matmul")) for name in ("single", "batches")}
        echoes = {kind: stack.enter_context(echo(kind)) for kind in ("sync", "aio", "rest")}
        for server in servers.values():
            check_matmul(predict(server.grpc, request))
        grpc_addresses = {"sync": echoes["sync"], "aio": echoes["aio"]} | {n: s.grpc for n, s in servers.items()}
        over_grpc = {name: partial(predict, address, request) for name, address in grpc_addresses.items()}
        rates = interleaved_throughput(over_grpc, ROUNDS, CLIENTS, SECONDS)
        rest_addresses = {"rest": echoes["rest"]} | {n: s.rest for n, s in servers.items()}
        over_rest = {name: partial(rest, address) for name, address in rest_addresses.items()}
        rest_rates = interleaved_throughput(over_rest, ROUNDS, CLIENTS, SECONDS)
    floor = max(rates["sync"], rates["aio"])
    what, rest_what = f"gRPC, {CLIENTS} clients; floor: bare echo", f"REST, {CLIENTS} clients; floor: bare app"
    return [
        Row(f"{what}; without a batch dim", "req/s", floor, rates["single"], at_least=GOAL),
        Row(f"{what}; with one", "req/s", floor, rates["batches"], at_least=GOAL),
        Row(f"{rest_what}; without a batch dim", "req/s", rest_rates["rest"], rest_rates["single"], at_least=GOAL),
        Row(f"{rest_what}; with one", "req/s", rest_rates["rest"], rest_rates["batches"], at_least=GOAL),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report("front", measure(Path(name)), machine())
