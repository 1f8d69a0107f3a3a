"""`make bench-state`: what a step writes into a key-value cache, and how long it takes, beside the module itself.

One rank, one thread, one word a step, in this process; the module and its shard run in turns. "functional": the shard's
graph as its file has it, where a write to a part of a buffer makes a new buffer, which is copied when the step is done.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Row, machine, report
from shardserve.export import export
from shardserve.shards import program as programs
from shardserve.shards.collective import SingleRank
from shardserve.shards.program import Program

WIDTH, HEADS, BLOCKS, LONGEST = 512, 8, 2, 8192
STEPS = 200
WARM = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, LONGEST, WIDTH // HEADS))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        mask = torch.arange(LONGEST) <= position[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return x + self.o(y.transpose(1, 2).flatten(-2))


class Decoder(nn.Module):
    """x [1, 1, 512] at position [1] → the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, position)
        return x


class Written(TorchDispatchMode):
    """Counts the bytes that operators write of buffers: parts in place, and whole new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._opname
        if name in ("index_put_", "_index_put_impl_"):
            self.bytes += args[2].nbytes
        elif name in ("copy_", "index_put") and result.numel() >= LONGEST:
            self.bytes += result.nbytes
        return result


@contextmanager
def functional() -> Iterator[None]:
    """Within it, programs are loaded with their graphs as they are in the files."""
    with patch.object(programs, "write_in_place", lambda graph, buffer, update: None):
        yield


def measure(folder: Path) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = Decoder()
    x, position = torch.randn(1, 1, WIDTH), torch.tensor([3])
    export(model, (x, position), name="decoder", out=folder)
    file = folder / "device0" / "decoder.graph.json"
    shard = Program.load(file)
    with functional():
        copying = Program.load(file)

    def step_of(program: Program) -> Callable[[Tensor], Tensor]:
        return lambda position: program.run({}, [x, position], SingleRank())[0]

    steps = {"module": lambda position: model(x, position), "shard": step_of(shard), "functional": step_of(copying)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    written: dict[str, float] = {}
    with torch.inference_mode():
        for number in range(WARM + STEPS):
            position = torch.tensor([number])
            results = []
            for name, step in steps.items():
                began = time.perf_counter()
                results.append(step(position))
                seconds[name].append(time.perf_counter() - began)
            if not all(torch.allclose(result, results[0], atol=1e-5) for result in results):
                raise AssertionError("a wrong answer")
        for name, step in steps.items():
            with Written() as count:
                step(position)
            written[name] = count.bytes / 1e3
    times = {name: statistics.median(each[WARM:]) * 1e3 for name, each in seconds.items()}
    least = BLOCKS * 2 * WIDTH * 4 / 1e3
    where = f"caches of {LONGEST} positions"
    return [
        Row(f"written in a step, {where}", "KB", least, written["shard"], at_most=1.0),
        Row("  functional", "KB", least, written["functional"]),
        Row(f"a step, {where}", "ms", times["module"], times["shard"], at_most=1.1),
        Row("  functional", "ms", times["module"], times["functional"]),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report("state", measure(Path(folder)), machine())


if __name__ == "__main__":
    main()
