"""Another user of this host: a process that has given up this one's uid."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hosts import NO_SKIP

NOBODY = 65534
# What is imported first can't be any more once the files of this user are out of reach.
BECOME = f"""
import encodings.idna, os, socket
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import Generation, group
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
"""


@contextlib.contextmanager
def stranger(script: str) -> Iterator[subprocess.Popen[str]]:
    """Runs this as another user; skips where that takes root, with TESTS_NO_SKIP=1 it fails instead. Its standard input
    ends when this is left, and with that the script should."""
    if os.geteuid() != 0:
        reason = "a process of another user needs root"
        pytest.fail(reason) if os.environ.get(NO_SKIP) == "1" else pytest.skip(reason)
    command = [sys.executable, "-c", BECOME + script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(20)
    assert process.returncode == 0
