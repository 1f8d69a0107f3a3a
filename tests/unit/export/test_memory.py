"""How much memory of its own an export and a loaded shard need, seen in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WIDTH, LAYERS = 2048, 16
MODEL_MB = WIDTH * WIDTH * 4 * LAYERS / 1e6

CODE = """
import re, sys, threading
from pathlib import Path
import torch
from torch import nn
from shardserve.export import Plan, export, without_storage
from shardserve.export.weights_file import write_weights
from shardserve.shards.program import Program
from shardserve.shards.weights import Weights

WIDTH, LAYERS, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def anonymous():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous:\\s+(\\d+) kB", text)[1]) * 1024 / 1e6

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.over, self.most = threading.Event(), anonymous()
        self.begin = self.most

    def run(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, anonymous())

    def end(self):
        self.over.set()
        self.join()
        return max(self.most, anonymous()) - self.begin

def make(layers):
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))

def exported(model, name, **weights):
    plan = Plan({"*.weight": "Shard(0)"})
    export(model, (torch.ones(1, WIDTH),), name=name, out=folder / name, tensor_parallel=2, plan=plan, **weights)

# What torch needs the first time that it traces is none of the model's.
exported(make(1), "first")
layout = {f"{index}.weight": (torch.float32, (WIDTH, WIDTH)) for index in range(LAYERS)}
noise = torch.randn(WIDTH, WIDTH)
write_weights(folder / "w.safetensors", layout, lambda _: noise)

peak = Peak()
peak.start()
with without_storage():
    model = make(LAYERS)
exported(model, "lean", weights=folder / "w.safetensors")
print("export", peak.end())
del model
graph = folder / "lean" / "device0" / "lean.graph.json"
for mapped in (True, False):
    peak = Peak()
    peak.start()
    program = Program.load(graph, weights=Weights(mapped))
    print("mapped" if mapped else "read", peak.end())
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    words = [sys.executable, "-c", CODE, str(WIDTH), str(LAYERS), str(tmp_path_factory.mktemp("memory"))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}


def test_an_export_from_files_needs_a_tensor_s_part(peaks: dict[str, float]) -> None:
    assert peaks["export"] < MODEL_MB / 4


def test_a_shard_is_read_into_its_own_bytes(peaks: dict[str, float]) -> None:
    shard = MODEL_MB / 2
    assert 0.9 * shard < peaks["read"] < 1.05 * shard + 2
    assert peaks["mapped"] < shard / 10
