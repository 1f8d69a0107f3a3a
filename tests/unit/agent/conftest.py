"""What the tests of supervisors and agents share."""

import os
import socket

import pytest

from .scripted import HOST


@pytest.fixture
def ports():
    """A port for the Worker, and the first of several free ones for the agents."""
    with socket.socket() as worker:
        worker.bind((HOST, 0))
        port = worker.getsockname()[1]
    for start in range(20_000 + os.getpid() % 5000, 30_000, 7):
        try:
            for offset in range(4):
                with socket.socket() as probe:
                    probe.bind((HOST, start + offset))
        except OSError:
            continue
        return port, start
    raise AssertionError("no ports")
