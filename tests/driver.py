"""A user's script that calls the launch API as a test tells it to, one call after the other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from serving import Processes

SCRIPT = """
import json
import sys

from shardserve import server
from shardserve.errors import ShardserveError
from shardserve.server import distributed

CALLS = {
    "start_servable": distributed.start_servable,
    "startup_agents": distributed.startup_agents,
    "start_grpc_server": server.start_grpc_server,
    "start_restful_server": server.start_restful_server,
    "stop": server.stop,
}
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        CALLS[name](**options)
        print(json.dumps("done"), flush=True)
    except ShardserveError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""
DONE = "done"


class Driver:
    """The script in `folder`, whose relative paths are taken from there; it runs in `cwd`. One of `processes`."""

    def __init__(self, processes: Processes, folder: Path, name: str, cwd: Path) -> None:
        script = folder / f"{name}.py"
        script.write_text(SCRIPT)
        self._process = processes.start(script, cwd=cwd, stdin=subprocess.PIPE)

    def begin(self, call: str, **options: Any) -> None:
        """Calls it; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, options]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """ "done", or the class and text of the error."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the script ended with code {self._process.wait(10)}"
        answer: str = json.loads(line)
        return answer

    def ask(self, call: str, **options: Any) -> str:
        self.begin(call, **options)
        return self.answer()

    def end(self) -> int:
        """Stops what it has started, and the script; its exit code."""
        assert self.ask("stop") == DONE
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)
