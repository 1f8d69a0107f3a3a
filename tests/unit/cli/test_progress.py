"""Bars on a terminal and nowhere else; what a start waits for, in the log."""

import asyncio
import contextlib
import subprocess
import sys
import time

import pytest
import torch
from terminal import OnTerminal

from shardserve import progress
from shardserve.export import Plan, export, verify

MODULE = """
import torch

def make():
    batch = torch.export.Dim("batch", min=1, max=4)
    options = {"dynamic_shapes": {"input": {0: batch}}, "plan": {"parameters": {"weight": "Shard(0)"}}}
    return torch.nn.Linear(4, 4), (torch.randn(2, 4),), options
"""
COMMAND = ("export", "user_model:make", "--name", "m", "--out", "model", "--tp", "2", "--verify")
PHASES = {
    "loading the model": 1,
    "tracing the model": 1,
    "cutting the graph": 2,
    "writing shards": 2,
    "reading shards": 2,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "user_model.py").write_text(MODULE)
    return tmp_path


def test_on_a_terminal_each_phase_has_a_bar_and_all_vanish(folder):
    with OnTerminal(COMMAND, folder) as command:
        drawn = command.read_to_end()
        output = command.process.stdout.read()
        assert command.process.wait(30) == 0
    for what, total in PHASES.items():
        assert f"\r{what}: 0 of {total} |" in drawn
    assert "\rcomparing sizes: 0 of " in drawn
    # What is left of the last bar is blank.
    assert drawn.endswith("\r")
    assert not drawn.split("\r")[-2].strip()
    assert "max abs error: " in output


def test_the_terminal_s_size_is_respected(folder):
    with OnTerminal(COMMAND, folder) as command:
        drawn = command.read_to_end()
    # This one doesn't say how large it is.
    assert max(map(len, drawn.split("\r"))) <= 80


def test_piped_nothing_of_it_is_written(folder):
    command = [sys.executable, "-m", "shardserve.cli", *COMMAND]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    assert done.stderr == b""
    assert not {byte for byte in done.stdout if byte < 32} - {ord("\n")}


def test_export_and_verify_tell_a_callback(tmp_path):
    told = []
    model, args = torch.nn.Linear(4, 4), (torch.randn(2, 4),)
    plan = Plan({"weight": "Shard(0)"})

    def tell(*arguments):
        told.append(arguments)

    export(model, args, name="m", out=tmp_path, tensor_parallel=2, pipeline_parallel=1, plan=plan, progress=tell)
    verify(model, args, None, tmp_path, "m", progress=tell)
    assert told == [
        ("tracing the model", 0, 1),
        ("cutting the graph", 0, 2),
        ("cutting the graph", 1, 2),
        ("writing shards", 0, 2),
        ("writing shards", 1, 2),
        ("writing shards", 2, 2),
        ("reading shards", 0, 2),
        ("reading shards", 1, 2),
        ("comparing sizes", 0, 1),
    ]


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ([3, 4, 5, 6, 7], "agents: 3 of 8 are there, missing ranks 3-7"),
        ([1, 2, 3, 4, 5, 6, 7], "agents: 1 of 8 is there, missing ranks 1-7"),
        ([0, 2, 3, 5], "agents: 4 of 8 are there, missing ranks 0, 2-3, 5"),
        ([6], "agents: 7 of 8 are there, missing rank 6"),
        ([], "groups to form and Python stages to start; all 8 agents are there"),
    ],
)
def test_which_agents_are_waited_for(missing, text):
    assert progress.agents_waited_for(8, missing) == text


def test_it_is_said_again_after_growing_intervals(caplog):
    began = time.monotonic()

    async def run():
        said = asyncio.Event()
        times = []

        def waiting():
            times.append(time.monotonic() - began)
            if len(times) == 3:
                said.set()
            return f"answer {len(times)}"

        task = asyncio.create_task(progress.remind(0.05, waiting))
        await asyncio.wait_for(said.wait(), 20)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return times

    times = asyncio.run(run())
    assert [record.message for record in caplog.records] == [f"answer {i}" for i in (1, 2, 3)]
    assert [at >= least for at, least in zip(times, (0.05, 0.15, 0.35), strict=True)] == [True] * 3
