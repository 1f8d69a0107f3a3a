"""What our processes have in common: they don't outlive their parent, and they keep large tensors in huge pages."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1

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
