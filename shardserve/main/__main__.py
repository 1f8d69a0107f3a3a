"""`python -m shardserve.main FD`: FD is this process's end of the launcher's socketpair."""

from __future__ import annotations

import signal
import socket
import sys

import uvloop

from shardserve.log import configure_logging
from shardserve.main.app import Main
from shardserve.wire.process import control_of_parent, raise_descriptor_limit


def main(fd: int) -> None:
    # The launcher drives the stop; a Ctrl-C reaches every process of the terminal's group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("main")
    raise_descriptor_limit()
    launcher = control_of_parent(fd)
    launcher.setblocking(False)
    uvloop.run(_run(launcher))


async def _run(launcher: socket.socket) -> None:
    await Main().run(launcher)


if __name__ == "__main__":
    main(int(sys.argv[1]))
