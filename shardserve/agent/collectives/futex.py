"""futex(2) through libc's syscall(): a 32-bit word in shared memory on which processes sleep until it changes."""

from __future__ import annotations

import ctypes
import errno
import platform

FUTEX_WAIT = 0
FUTEX_WAKE = 1
EVERYBODY = 0x7FFFFFFF
# Linux syscall tables: x86_64 unistd_64.h, others include/uapi/asm-generic/unistd.h.
SYSCALL_NUMBER = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def wait(address: int, value: int, timeout: float) -> bool:
    """Sleeps while the word is `value`; False if `timeout` seconds passed. May wake early. Releases the GIL."""
    limit = Timespec(int(timeout), int(timeout % 1 * 1e9))
    arguments = (ctypes.c_void_p(address), FUTEX_WAIT, ctypes.c_uint32(value), ctypes.byref(limit), None, 0)
    if _libc.syscall(SYSCALL_NUMBER, *arguments) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EAGAIN, errno.EINTR):
        return True
    if error == errno.ETIMEDOUT:
        return False
    raise OSError(error, "futex wait")


def wake(address: int) -> None:
    """Wakes all processes that sleep on the word at `address`."""
    _libc.syscall(SYSCALL_NUMBER, ctypes.c_void_p(address), FUTEX_WAKE, EVERYBODY, None, None, 0)
