"""`shardserve export` that is interrupted or killed while it writes, and while it puts in place what it has written."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shardserve.cli import main
from shardserve.export import Plan, export
from shardserve.shards.config import CONFIG_FILE, ShardConfig

# It says so and waits for a signal when it comes to what EVENT and PATH name, for the TIMES-th time.
MODULE = """
import os
import signal
import sys

import torch
from torch import nn

left = int(os.environ["TIMES"])


def wait(event, args):
    global left
    if event == os.environ["EVENT"] and os.environ["PATH_PART"] in str(args[0]):
        left -= 1
        if not left:
            os.write(int(os.environ["READY"]), b".")
            signal.pause()


def make():
    sys.addaudithook(wait)
    plan = {"parameters": {"weight": "Shard(0)", "bias": "Shard(0)"}}
    return nn.Linear(8, 8), (torch.randn(2, 8),), {"plan": plan}
"""
WRITING = ("open", "/device1/", 1)
PUTTING_IN_PLACE = ("os.rename", "/device", 2)  # the former device0 is away, and no other is there yet
TIMEOUT = 120.0


def write(out: Path) -> str:
    plan = Plan({"weight": "Shard(0)", "bias": "Shard(0)"})
    return export(nn.Linear(8, 8), (torch.randn(2, 8),), name="net", out=out, tensor_parallel=2, plan=plan).export_id


def export_ids(out: Path) -> set[str]:
    return {ShardConfig.load(file).export_id for file in out.glob(f"*/{CONFIG_FILE}")}


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def ended(folder: Path, at: tuple[str, str, int], number: signal.Signals) -> tuple[int, str]:
    """The exit code and stderr of an export into folder/model that gets the signal there; $TMPDIR stays empty."""
    (folder / "userland.py").write_text(MODULE)
    temporary = folder / "tmp"
    temporary.mkdir()
    words = ["export", "userland:make", "--name", "net", "--out", "model", "--tp", "2"]
    readable, writable = os.pipe()
    event, path, times = at
    said = {"EVENT": event, "PATH_PART": path, "TIMES": str(times), "READY": str(writable)}
    with subprocess.Popen(
        [sys.executable, "-m", "shardserve.cli", *words],
        cwd=folder,
        env={**os.environ, **said, "TMPDIR": str(temporary)},
        pass_fds=[writable],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as exporter:
        os.close(writable)
        try:
            ready, _, _ = select.select([readable], [], [], TIMEOUT)
            assert ready
            if os.read(readable, 1):  # else it has ended by itself
                exporter.send_signal(number)
            _, error = exporter.communicate(timeout=TIMEOUT)
        finally:
            os.close(readable)
            exporter.kill()
    assert names(temporary) == []
    return exporter.returncode, error


@pytest.mark.parametrize(
    ("number", "code", "error"),
    [
        (signal.SIGINT, 130, "shardserve export: interrupted\n"),
        (signal.SIGTERM, -signal.SIGTERM, ""),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_an_export_that_is_ended_while_it_writes_leaves_the_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, error: str
) -> None:
    out = tmp_path / "model"
    before = write(out)
    assert ended(tmp_path, WRITING, number) == (code, error)
    hidden, shards = names(out)[:-2], names(out)[-2:]
    assert shards == ["device0", "device1"]
    assert export_ids(out) == {before}
    assert [name.startswith(".export-") for name in hidden] == ([] if number is signal.SIGINT else [True])
    assert main(["inspect", str(out)]) == 0
    assert "2 ranks" in capsys.readouterr().out
    after = write(out)
    assert names(out) == ["device0", "device1"]
    assert export_ids(out) == {after}


def test_an_interrupt_while_folders_are_put_in_place_puts_the_former_ones_back(tmp_path: Path) -> None:
    before = write(tmp_path / "model")
    assert ended(tmp_path, PUTTING_IN_PLACE, signal.SIGINT) == (130, "shardserve export: interrupted\n")
    assert names(tmp_path / "model") == ["device0", "device1"]
    assert export_ids(tmp_path / "model") == {before}


def test_former_shards_that_a_kill_has_kept_from_being_replaced_are_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two renames: the one moment in which a kill leaves neither export whole."""
    out = tmp_path / "model"
    before = write(out)
    assert ended(tmp_path, PUTTING_IN_PLACE, signal.SIGKILL) == (-signal.SIGKILL, "")
    hidden, *left = names(out)
    assert left == ["device1"]
    assert ShardConfig.load(out / hidden / "old" / "device0" / CONFIG_FILE).export_id == before
    assert main(["inspect", str(out)]) == 1
    assert "device0" in capsys.readouterr().err
    after = write(out)
    assert names(out) == [hidden, "device0", "device1"]
    assert export_ids(out) == {after}
