"""The clients of `shardserve bench`, over an address where nobody listens."""

import asyncio
import time

import numpy as np

from shardserve.cli import load
from shardserve.client import channel, codec
from shardserve.errors import StepError


def run_alone(port, clients, seconds):
    async def run():
        async with channel.connect_async(f"127.0.0.1:{port}", None) as connection:
            spec = codec.servable_spec("m", "p", 0)
            request = codec.encode_request(spec, [{"x": np.ones(3, np.float32)}])
            return await load.Load(connection, [request], 5.0).run(clients, 0.0, seconds)

    return asyncio.run(run())


def test_clients_pause_when_nobody_is_there(free_port):
    level = run_alone(free_port, 3, 0.5)
    assert not level.given_up
    assert abs(level.seconds - 0.5) < 1e-6
    assert level.latencies == []
    # Each tries at once, and then every 0.1 s.
    assert 3 <= level.errors.pop("Unavailable") <= 3 * 6
    assert not level.errors
    assert level.first_error.startswith("UNAVAILABLE: ")


def test_a_load_is_given_up_when_nobody_comes_back(free_port, monkeypatch):
    monkeypatch.setattr(load, "GIVE_UP", 0.2)
    began = time.perf_counter()
    level = run_alone(free_port, 2, 60.0)
    assert level.given_up
    assert 0.2 < level.seconds <= time.perf_counter() - began < 30
    assert level.rate == 0.0


def test_errors_are_one_line():
    assert load.one_line(StepError("a\n  b\r\nc")) == "a b c"
