"""A server whose agent compiles its graph while it serves: eager at once, compiled later, the same answers."""

import concurrent.futures
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from serving import Up, write_servable
from torch import nn

from shardserve.agent.compilation import manifest_name
from shardserve.export import export

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# A C++ compiler takes its time, and has the cores last.
pytestmark = [needs_compiler, pytest.mark.timeout(300)]
SWAPPED = "steps are compiled from now on"
# The graph for any batch, and that for a batch of 1, which torch.export specializes.
VARIANTS = 2


@pytest.fixture(scope="module")
def served_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4)},)
    export(model, (torch.randn(3, 8),), name="net", out=folder / "model", dynamic_shapes=shapes)
    write_servable(folder, "net", "rank_size=1, stage_size=1", "x", "y")
    return folder, model


class CompilingUp(Up):
    stderr = subprocess.PIPE


def test_eager_at_once_and_compiled_later_with_the_same_answers(served_model, tmp_path):
    folder, model = served_model
    rows = np.random.default_rng(1).random((4, 8), np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(rows)).numpy()
    done = threading.Event()

    def ask(up, count):
        """Until the graphs are compiled, and once more; how often."""
        asked = 0
        with up.client(raise_errors=True) as client:
            last = False
            while not last:
                # The compiler gets what nobody else wants: a busy server would have it wait for ever.
                last = done.wait(0.05)
                for reply, wanted in zip(client.infer([{"x": row} for row in rows[:count]]), expected, strict=False):
                    np.testing.assert_allclose(reply["y"], wanted, rtol=0, atol=1e-5)
                asked += 1
        return asked

    environment = {"SHARDSERVE_COMPILE": "inductor", "XDG_CACHE_HOME": str(tmp_path), "SHARDSERVE_LOG_LEVEL": "INFO"}
    with CompilingUp(folder, folder / "model", "net", **environment) as up:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask, up, count) for count in (1, 4)]
            try:
                swapped = []
                for line in up.process.stderr:
                    assert "stay eager" not in line
                    if re.search(r" INFO (worker|agent)\[", line):
                        assert "] servable 'net' version 1: " in line
                    if SWAPPED in line:
                        swapped.append(line.partition(SWAPPED)[2].strip())
                    if len(swapped) == VARIANTS:
                        break
            finally:
                done.set()
            # While the compiler worked, steps went on.
            assert all(count.result(60) > VARIANTS for count in asking)
        for line, sizes in zip(sorted(swapped), ("= 1", ">= 2"), strict=True):
            assert line.endswith(f"net.graph.json with batch {sizes}")
    for ones in (frozenset(), frozenset({"batch"})):
        assert list(tmp_path.glob(f"shardserve/compiled/*/{manifest_name(ones)}"))
