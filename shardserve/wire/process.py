"""What our processes have in common: how they are started, that they don't outlive their parent, their limit of
descriptors, and that they keep large tensors in huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from shardserve.errors import StartError
from shardserve.wire.sockets import peer_of

PR_SET_PDEATHSIG = 1

SPARE = 32
_sparing = threading.Lock()

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In the environment of a process at its start: glibc's malloc asks for huge pages, which the kernel gives on request.

Memory of 256 MB is otherwise had in 65,536 page faults, 80 ms and more, each time that a step or message makes it anew.
"""


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when `parent`, its parent, dies; ends it if that happened already.

    The signal is sent when the *thread* that forked ends: a parent starts such children from a thread that stays.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # It died before the kernel was told.
        os._exit(1)


def control_of_parent(fd: int) -> socket.socket:
    """This process's end of the socketpair with the one that started it, whose death is its own from here on.

    The other end says who that was: one that died while this process was being imported would have left another parent.
    """
    control = socket.socket(fileno=fd)
    die_with_parent(peer_of(control).pid)
    return control


class Spawned(NamedTuple):
    """control: our end of the socketpair with it."""

    process: subprocess.Popen[bytes]
    pidfd: int
    control: socket.socket


def spawn(
    module: str, fds: Sequence[int] = (), kind: int = socket.SOCK_STREAM, environment: Mapping[str, str] = HUGE_PAGES
) -> Spawned:
    """`python -m MODULE CONTROL FDS…`, CONTROL being its end of a socketpair. The user's variables go before those of
    `environment`. StartError if this host has no descriptors, memory or processes left for it; then nothing is left.
    """
    with contextlib.ExitStack() as undo:
        try:
            control, theirs = socket.socketpair(socket.AF_UNIX, kind)
            undo.callback(control.close)
            with theirs:
                inherited = (theirs.fileno(), *fds)
                process = subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, inherited)],
                    pass_fds=inherited,
                    stdin=subprocess.DEVNULL,
                    # Where one was closed, the first socket would get its number, and what a library prints.
                    stdout=subprocess.DEVNULL if sys.__stdout__ is None else None,
                    stderr=subprocess.DEVNULL if sys.__stderr__ is None else None,
                    env={**environment, **os.environ},
                    # A terminal's Ctrl-C is for the parent, which ends its children in order.
                    start_new_session=True,
                )
            undo.callback(process.wait)
            undo.callback(process.kill)
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            raise StartError(f"{module} can't be started: {error}") from error
        undo.pop_all()
    return Spawned(process, pidfd, control)


def raise_descriptor_limit() -> None:
    """To the hard one, but for some `spare_descriptors`: every connection is a descriptor, and every piece of shared
    memory under way. The soft limit, often 1024, is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - min(SPARE, hard // 8), hard))


@contextlib.contextmanager
def spare_descriptors() -> Iterator[None]:
    """Within it those can be had that are kept from everybody else, for what connections under way can't do without:
    clients may have all others."""
    with _sparing:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
