"""A signal ends everything on the host: requests under way first, within stop_grace, then every process."""

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from models import slow
from serving import Up, shared_memory_files, write_servable

from shardserve.export import Plan, export

STOP_GRACE = 5


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    write_servable(folder, "slow", "rank_size=2, stage_size=1, with_batch_dim=False", "x", "y")
    export(
        slow.Slow(),
        slow.EXAMPLE,
        name="slow",
        out=folder / "model",
        tensor_parallel=2,
        plan=Plan(slow.PLAN),
        dynamic_shapes=slow.DYNAMIC_SHAPES,
        output_names=["y"],
    )
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_requests_under_way_are_answered_and_then_every_process_ends(slow_folder, number):
    before = shared_memory_files()
    with Up(slow_folder, slow_folder / "model", "slow") as up, up.client() as client:
        pending = client.infer_async({"x": np.ones((1000, 256), np.float32)}, timeout=60)
        wait_until_busy(up)
        start = time.monotonic()
        assert up.stop(number) == 0
        assert time.monotonic() - start < STOP_GRACE + 3
        result = pending.result()
        assert isinstance(result, list), result
        assert "y" in result[0]
    assert shared_memory_files() <= before


def test_a_request_that_takes_longer_than_the_grace_gets_an_error_and_every_process_ends(slow_folder):
    with Up(slow_folder, slow_folder / "model", "slow", SHARDSERVE_STOP_GRACE="0.5") as up, up.client() as client:
        pending = client.infer_async({"x": np.ones((60_000, 256), np.float32)}, timeout=60)
        wait_until_busy(up)
        start = time.monotonic()
        assert up.stop() == 0
        assert time.monotonic() - start < STOP_GRACE + 3
        assert "UNAVAILABLE" in pending.result()["error"]


def wait_until_busy(up):
    """Until the request is in the agents: they compute for longer than any other part of it takes."""
    pid = up.pids()[0]
    pause = threading.Event()
    start = ticks(pid)
    for _ in range(1000):
        if ticks(pid) > start + 5:
            return
        pause.wait(0.01)
    raise AssertionError("the request did not reach the agents")


def ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("port", ["grpc", "rest", "distributed"])
def test_a_busy_port_is_an_error_that_names_it_and_nothing_is_left(slow_folder, capfd, port):
    with Up(slow_folder, slow_folder / "model", "slow") as up:
        second = Up(slow_folder, slow_folder / "model", "slow")
        busy = getattr(up, port)
        process = second.start(*second.command, f"--{port}-address", busy)
        assert process.wait(60) == 1
        second.wait_all_ended(5)
        assert up.stop() == 0
    output = capfd.readouterr().err
    assert busy in output
    assert "in use" in output
    assert "Traceback" not in output
