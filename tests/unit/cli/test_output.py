"""A command whose output can't be written, and one that is interrupted while it imports."""

import os
import subprocess
import sys

import pytest

SHARDSERVE = [sys.executable, "-m", "shardserve.cli"]
TABLE = ["rank-table", "--host", "127.0.0.1:8"]


def shell(redirected, *words):
    """Runs a command with its output redirected by a shell, buffered as a user's; exit code, stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = ["bash", "-c", f'exec "$@" {redirected}', "bash", *SHARDSERVE, *words]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False)
    return done.returncode, done.stderr


def test_a_full_disk_is_one_line():
    assert shell(">/dev/full", *TABLE) == (
        1,
        "shardserve rank-table: can't write its output: No space left on device\n",
    )


def test_a_full_disk_under_more_than_a_buffer_is_one_line():
    code, error = shell(">/dev/full", "rank-table", "--host", "127.0.0.1:800")
    assert (code, error) == (1, "shardserve rank-table: can't write its output: No space left on device\n")


def test_a_full_disk_under_help_is_one_line():
    assert shell(">/dev/full", "--help") == (1, "shardserve: can't write its output: No space left on device\n")


def test_a_closed_output_is_one_line():
    assert shell(">&-", *TABLE) == (1, "shardserve rank-table: standard output is closed\n")


def test_a_pipe_that_nobody_reads_is_silent():
    assert shell("| true; exit ${PIPESTATUS[0]}", "rank-table", "--host", "127.0.0.1:9000") == (1, "")


IMPORTING = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
from shardserve.cli import main
sys.exit(main(["rank-table", "--host", "127.0.0.1:1"]))
"""


@pytest.mark.parametrize("module", ["shardserve.cli.commands", "numpy", "grpc", "shardserve.cli.commands.up"])
def test_an_interrupt_while_it_imports_is_exit_code_130_without_a_traceback(module):
    words = [sys.executable, "-c", IMPORTING, module]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "shardserve: interrupted\n")


def test_an_ignored_interrupt_stays_ignored():
    """As of what a script's shell starts in the background."""
    code = IMPORTING.replace("signal.default_int_handler", "signal.SIG_IGN")
    done = subprocess.run(
        [sys.executable, "-c", code, "numpy"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_entry_imports_nothing_large():
    code = "import sys, shardserve.cli; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"numpy", "grpc", "msgspec", "argparse", "tqdm"} & set(done.stdout.split())
