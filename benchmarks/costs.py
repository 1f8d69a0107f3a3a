"""`make bench-costs`: the constants of the exporter's cost model (shardserve/export/cost.py), as this machine has them.

One thread for each rank, as agents on as many cores have. The bandwidths and rates are those of large operands, the
fixed times those of the smallest.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import ranks
from benchmarks.report import Row, machine, report
from benchmarks.servers import free_port
from shardserve.agent.lifetime import Lifetime
from shardserve.agent.stage_link import IncomingLink, LinkBroken, OutgoingLink
from shardserve.export import export
from shardserve.export.cost import CPU
from shardserve.shards.collective import Collective, SingleRank
from shardserve.shards.program import Program
from shardserve.wire.messages import Generation
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name

ROUNDS = 5
OPERATORS = 200
SMALL, LARGE = 16, 1 << 20  # floats


def seconds(work: Callable[[], object], calls: int) -> float:
    """Median seconds of a call."""
    took = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def flops_per_second() -> float:
    """A linear layer of 64 rows."""
    layer, x = nn.Linear(2048, 2048, bias=False), torch.randn(64, 2048)
    return 2 * 64 * 2048 * 2048 / seconds(lambda: layer(x), 30)


def bytes_per_second() -> float:
    """A linear layer of one row, whose weight no cache holds."""
    layers, x = [nn.Linear(8192, 8192, bias=False) for _ in range(3)], torch.randn(1, 8192)
    return sum(layer.weight.nbytes for layer in layers) / seconds(lambda: [layer(x) for layer in layers], 5)


def operator_seconds(folder: Path) -> float:
    """An operator of a shard on one number, without what a step costs once."""
    programs = []
    for count in (OPERATORS, 2 * OPERATORS):
        out = folder / str(count)
        export(nn.Sequential(*(nn.Tanh() for _ in range(count))), (torch.ones(1),), name="chain", out=out)
        programs.append(Program.load(out / "device0" / "chain.graph.json"))
    x = torch.ones(1)

    def step(program: Program) -> None:
        program.begin()
        program.run({}, [x], SingleRank())

    few, many = (seconds(partial(step, program), 200) for program in programs)
    return (many - few) / OPERATORS


def collective_seconds(size: int, floats: int) -> float:
    """An all-reduce of `size` ranks."""

    def work(rank: int, collective: Collective) -> float:
        x = torch.ones(floats)
        return seconds(lambda: collective.all_reduce(x, "sum"), 1000 if floats == SMALL else 60)

    return statistics.median(ranks.run("shared_memory", size, work))


def link_seconds(floats: int) -> float:
    """From one stage to the next: half of there and back."""
    ports = free_port(), free_port()
    listeners = [[listen_tcp(address, "costs"), listen_abstract(twin_name(address))] for address in map(_local, ports)]
    pid = os.fork()
    side = 0 if pid else 1
    lifetime = Lifetime(Generation(1, 1))
    x, calls = torch.ones(floats), 300 if floats == SMALL else 40
    outgoing = OutgoingLink(_local(ports[1 - side]), 0, lifetime, 20.0, print)
    incoming = IncomingLink(listeners[side], lifetime, 20.0)
    steps = iter(range(calls))

    def turn() -> None:
        step = next(steps)
        if pid:
            outgoing.send(step, [x])
        incoming.receive(step)
        if not pid:
            outgoing.send(step, [x])

    half = seconds(turn, calls) / 2
    if not pid:
        with contextlib.suppress(LinkBroken):
            incoming.receive(calls)  # until the parent, which has all answers, closes its side
        os._exit(0)
    lifetime.end()
    os.waitpid(pid, 0)
    return half


def _local(port: int) -> Address:
    return Address("127.0.0.1", port)


def measure(folder: Path) -> list[Row]:
    torch.set_num_threads(1)
    works: dict[str, Callable[[], float]] = {
        "flops": flops_per_second,
        "bytes": bytes_per_second,
        "operator": lambda: operator_seconds(folder),
        **{f"all-reduce {n}": partial(collective_seconds, n, SMALL) for n in (2, 4)},
        "large all-reduce": lambda: collective_seconds(2, LARGE),
        "link": lambda: link_seconds(SMALL),
        "large link": lambda: link_seconds(LARGE),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, work in works.items():
                found[name].append(work())
    value = {name: statistics.median(values) for name, values in found.items()}
    # On 2 ranks each takes in as many bytes as it gives.
    reduced = 4 * LARGE / (value["large all-reduce"] - value["all-reduce 2"])
    sent = 4 * LARGE / (value["large link"] - value["link"])
    return [
        Row("flops_per_second", "GFLOP/s", CPU.flops_per_second / 1e9, value["flops"] / 1e9),
        Row("bytes_per_second", "GB/s", CPU.bytes_per_second / 1e9, value["bytes"] / 1e9),
        Row("operator_seconds", "us", CPU.operator_seconds * 1e6, value["operator"] * 1e6),
        Row("collective_seconds, 2 ranks", "us", CPU.collective_time("", 0, 2) * 1e6, value["all-reduce 2"] * 1e6),
        Row("collective_seconds, 4 ranks", "us", CPU.collective_time("", 0, 4) * 1e6, value["all-reduce 4"] * 1e6),
        Row("collective_bytes_per_second", "GB/s", CPU.collective_bytes_per_second / 1e9, reduced / 1e9),
        Row("link_seconds", "us", CPU.link_seconds * 1e6, value["link"] * 1e6),
        Row("link_bytes_per_second", "GB/s", CPU.link_bytes_per_second / 1e9, sent / 1e9),
    ]


if __name__ == "__main__":
    print("floor: what shardserve/export/cost.py has")
    with tempfile.TemporaryDirectory() as name:
        report("costs", measure(Path(name)), machine())
