"""How a child makes sure that it doesn't outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when `parent`, its parent, dies; ends it if that happened already.

    The signal is sent when the *thread* that forked ends: a parent starts such children from a thread that stays.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # It died before the kernel was told.
        os._exit(1)
