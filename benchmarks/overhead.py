"""`make bench-overhead`: what Main, Worker and one agent cost on top of bare gRPC.

Floor: the faster of a sync and an aio server that decode and encode the same messages (48 KB in, 8 KB out), called in
turns with ours by the same loop with a request that is built once. Beside it the bare chain of `benchmarks.chain`: what
three processes cost that do nothing but the work. Then with pauses between the calls, as a model's step makes them:
caches and cores have gone cold. Then both again while no core may halt: how much of it is the machine, which runs the
same code slower after each halt.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from benchmarks.load import check_matmul, interleaved_p50, matmul_request, predict
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import awake, chain, echo, up

ROUNDS = 15
CALLS = 200
PAUSE = 0.02
GOAL = 1.5
WHAT = "p50 of a matmul call, 1 rank; floor: bare gRPC echo"


def measure(folder: Path) -> list[Row]:
    """The first row is the one with the goal, the second the same with pauses."""
    matmul(folder, 1)
    request = matmul_request()
    with contextlib.ExitStack() as stack:
        addresses = {kind: stack.enter_context(echo(kind)) for kind in ("sync", "aio")}
        addresses["chain"] = stack.enter_context(chain())
        addresses["ours"] = stack.enter_context(up(folder, "matmul")).grpc
        calls = {name: predict(address, request) for name, address in addresses.items()}
        for name in ("chain", "ours"):
            check_matmul(calls[name])
        p50 = interleaved_p50(calls, ROUNDS, CALLS)
        p50_apart = interleaved_p50(calls, ROUNDS, CALLS // 10, PAUSE)
        with awake():
            p50_awake = interleaved_p50(calls, ROUNDS, CALLS)
    return [
        _row(WHAT, p50, "ours", GOAL),
        _row(f"... with pauses of {PAUSE * 1e3:g} ms", p50_apart, "ours"),
        _row("... of a bare chain of three processes", p50, "chain"),
        _row("no core may halt: p50 of ours", p50_awake, "ours"),
        _row("... of the bare chain", p50_awake, "chain"),
    ]


def _row(name: str, p50: dict[str, float], which: str, goal: float | None = None) -> Row:
    return Row(name, "ms", min(p50["sync"], p50["aio"]) * 1e3, p50[which] * 1e3, goal)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report("overhead", measure(Path(folder)), machine())


if __name__ == "__main__":
    main()
