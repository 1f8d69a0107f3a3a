"""Commands whose stderr is a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class OnTerminal:
    """A command of `shardserve` with stdout in a pipe and stderr on a terminal of its own; killed when left."""

    def __init__(self, arguments: Sequence[object], cwd: Path | None = None, **environment: str) -> None:
        self._master, slave = pty.openpty()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shardserve.cli", *map(str, arguments)],
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=slave,
                text=True,
            )
        finally:
            os.close(slave)
        self.drawn = ""

    def read_until(self, text: str, seconds: float = 60) -> None:
        """Until the terminal has shown the text."""
        deadline = time.monotonic() + seconds
        while text not in self.drawn:
            readable, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{text!r} is not in {self.drawn!r}"
            assert self._read(), f"{text!r} is not in {self.drawn!r}, and the command has ended"

    def read_to_end(self) -> str:
        """All that the terminal has shown when nobody holds it any more."""
        while self._read():
            pass
        return self.drawn

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:
            # EIO: its other side is closed.
            return False
        self.drawn += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self._master)
