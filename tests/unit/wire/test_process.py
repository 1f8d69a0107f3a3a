"""Processes that don't outlive their parent."""

import os
import select
import signal
import subprocess
import sys

LAUNCHER = """
import os, signal, socket, sys
from shardserve.wire.frames import encode
from shardserve.wire.messages.launch import Serve
from shardserve.wire.process import spawn

listeners = [socket.socket() for _ in range(3)]
worker, _, control = spawn("shardserve.worker", [listener.fileno() for listener in listeners])
for piece in encode(Serve(1, sys.argv[1], "net", 1, "", 1, 0), ()):
    control.sendall(piece)
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_whose_launcher_dies_while_it_is_imported_does_not_live_on_with_its_order(tmp_path):
    """It would hold the launcher's ports for as long as the servable's file runs."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "servable_config.py").write_text("while True:\n    pass\n")
    launcher = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    with subprocess.Popen(launcher, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([pidfd], [], [], 20)
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ended
    finally:
        os.close(pidfd)
