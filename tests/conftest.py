import fcntl
import gc
import multiprocessing.resource_tracker
import os
import tempfile
import threading
from pathlib import Path

import ports
import psutil
import pytest

from shardserve.wire.segments import TRIMMING


@pytest.fixture
def free_port():
    """A port of 127.0.0.1 that nobody has."""
    return ports.free_port()


@pytest.fixture
def example_ports():
    """The reference example's own ports, for tests that run its scripts: one of this machine at a time has them."""
    with open(Path(tempfile.gettempdir()) / "shardserve-example-ports", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _threads():
    # That of the process's segments of shared memory may begin anew while other tests' connections have some.
    return {thread for thread in threading.enumerate() if thread.name != TRIMMING}


def _children():
    # multiprocessing keeps one helper process as long as the interpreter lives.
    helper = multiprocessing.resource_tracker._resource_tracker._pid
    return {child for child in psutil.Process().children(recursive=True) if child.pid != helper}


def _descriptors():
    held = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            held[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return held


def _new(before):
    # Barriers and the like of multiprocessing live in memory that it keeps.
    return {
        fd: name
        for fd, name in _descriptors().items()
        if before.get(fd) != name and not name.startswith("/dev/shm/pym-")
    }


@pytest.fixture
def nothing_left():
    """The test ends with the threads, descriptors and child processes that it began with."""
    threads, descriptors, children = _threads(), _descriptors(), _children()
    yield
    for thread in _threads() - threads:
        thread.join(30)
        assert not thread.is_alive(), f"{thread} is left"
    _, alive = psutil.wait_procs(_children() - children, timeout=30)
    assert not alive
    if _new(descriptors):
        gc.collect()
    assert not _new(descriptors)
