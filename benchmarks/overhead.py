"""`make bench-overhead`: what Main, Worker and one agent cost on top of bare gRPC.

Floor: the faster of a sync and an aio server that decode and encode the same messages (48 KB in, 8 KB out), called in
turns with ours by the same loop with a request that is built once.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from benchmarks.load import check_matmul, interleaved_p50, matmul_request, predict
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import echo, up

ROUNDS = 15
CALLS = 200
GOAL = 1.5


def measure(folder: Path) -> list[Row]:
    matmul(folder, 1)
    request = matmul_request()
    with contextlib.ExitStack() as stack:
        addresses = {kind: stack.enter_context(echo(kind)) for kind in ("sync", "aio")}
        addresses["ours"] = stack.enter_context(up(folder, "matmul")).grpc
        calls = {name: predict(address, request) for name, address in addresses.items()}
        for call in calls.values():
            check_matmul(call)
        p50 = interleaved_p50(calls, ROUNDS, CALLS)
    floor = min(p50["sync"], p50["aio"])
    return [Row("p50 of a matmul call, 1 rank; floor: bare gRPC echo", "ms", floor * 1e3, p50["ours"] * 1e3, GOAL)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report("overhead", measure(Path(folder)), machine())


if __name__ == "__main__":
    main()
