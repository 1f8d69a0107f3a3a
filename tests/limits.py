"""Limits of a process that a test sets for a while."""

import contextlib
import gc
import os
import resource

import psutil


@contextlib.contextmanager
def no_descriptors_left(pid):
    """A process gets none unless it raises its soft limit."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    free = next(number for number in range(len(held) + 1) if number not in held)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def memory_left(nbytes, pid=None):
    """A process, this one by default, can have this much more address space and no more."""
    process = psutil.Process(pid)
    # What others have left would make room when it goes.
    gc.collect()
    limits = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + nbytes, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_AS, limits)
