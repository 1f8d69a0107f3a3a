"""`python -m shardserve.worker.stages FD`: a process for Python stages, on its end of a socketpair with the Worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from shardserve.log import configure_logging
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import stages
from shardserve.wire.process import control_of_parent
from shardserve.worker.stages.process import Connection, StageProcess


def main() -> None:
    control = control_of_parent(int(sys.argv[1]))
    # The launcher drives the stop; a Ctrl-C reaches every process of the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM is taken by a handler and given back at a fork: what a user's function starts has to end by it, and would
    # inherit SIG_IGN.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    configure_logging("stages")
    # What a user's function starts must not keep the connection open.
    control.set_inheritable(False)
    connection: Connection = FrameSocket(control, stages.ToProcess)
    with contextlib.suppress(EOFError, OSError):
        StageProcess(connection).serve()


if __name__ == "__main__":
    main()
