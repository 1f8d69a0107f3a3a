"""A signal ends everything on the host: requests under way first, within stop_grace, then every process."""

import contextlib
import os
import signal
import time

import pytest
from serving import shared_memory_files, token_ids, transformer_instances

from shardserve.client import status

# stop_grace, then exit_timeout, and some seconds for a machine that others use, too.
SECONDS_TO_STOP = 5 + 5 + 5


@contextlib.contextmanager
def under_way(up, client):
    """A request whose step is under way, and ends when the returned function is called."""
    pid = up.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        pending = client.infer_async(transformer_instances(token_ids(1, 6, seed=1)), timeout=60)
        while status(up.grpc)["servables"][0]["waiting_requests"] == 0:
            pass
        yield pending, lambda: wake(pid)
    finally:
        wake(pid)


def wake(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_requests_under_way_are_answered_and_then_every_process_ends(transformer, number):
    before = shared_memory_files()
    with transformer.up() as up, up.client() as client:
        with under_way(up, client) as (pending, go_on):
            start = time.monotonic()
            up.process.send_signal(number)
            wait_until_stopping(up)
            go_on()
            result = pending.result()
        assert isinstance(result, list), result
        assert "logits" in result[0]
        assert up.wait_stopped() == 0
        assert time.monotonic() - start < SECONDS_TO_STOP
    assert shared_memory_files() <= before


def test_a_request_that_takes_longer_than_the_grace_gets_an_error_and_every_process_ends(transformer):
    with transformer.up(SHARDSERVE_STOP_GRACE="0.5") as up, up.client() as client:
        with under_way(up, client) as (pending, go_on):
            start = time.monotonic()
            up.process.send_signal(signal.SIGTERM)
            assert "UNAVAILABLE" in pending.result()["error"]
            go_on()
        assert up.wait_stopped() == 0
        assert time.monotonic() - start < SECONDS_TO_STOP


def wait_until_stopping(up):
    """Until new requests are refused."""
    with up.client() as client:
        while "UNAVAILABLE" not in str(client.infer({}, timeout=60)):
            pass


@pytest.fixture(scope="module")
def served(transformer):
    with transformer.up() as up:
        yield up
        assert up.stop() == 0


@pytest.mark.parametrize("port", ["grpc", "rest", "distributed"])
def test_a_busy_port_is_an_error_that_names_it_and_nothing_is_left(transformer, served, capfd, port):
    second = transformer.up()
    busy = getattr(served, port)
    process = second.start(*second.command, f"--{port}-address", busy)
    assert process.wait(60) == 1
    second.wait_all_ended(20)
    process.stdout.close()
    output = capfd.readouterr().err
    assert busy in output
    assert "in use" in output
    assert "Traceback" not in output
