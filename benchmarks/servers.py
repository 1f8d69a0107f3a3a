"""What the benchmarks run: servers of ours as a user would start them, and bare echo servers as floors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SPIN = """import os, sys, threading
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
# Whatever ends this benchmark, its spinning ends with it.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(flush=True)
while True:
    pass
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def echo(kind: str) -> contextlib.AbstractContextManager[str]:
    """The address of a bare server of `benchmarks.echo`: sync or aio for gRPC, rest for the REST stack."""
    return _bare("benchmarks.echo", kind)


def chain() -> contextlib.AbstractContextManager[str]:
    """The address of the three bare processes of `benchmarks.chain`."""
    return _bare("benchmarks.chain", "front")


@contextlib.contextmanager
def _bare(*command: str) -> Iterator[str]:
    whole = [sys.executable, "-m", *command]
    process = subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keeps all cores from halting, by processes that run only where nothing else would (SCHED_IDLE, sched(7))."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass
class Up:
    """A running `shardserve up`. ready_seconds: from its start to its `ready` line."""

    process: subprocess.Popen[str]
    grpc: str
    rest: str
    ready_seconds: float

    def find_processes(self) -> dict[str, list[psutil.Process]]:
        """The whole family by role: launcher, main, worker, fork_server, agent, stages."""
        found: dict[str, list[psutil.Process]] = {"launcher": [psutil.Process(self.process.pid)]}
        for process in found["launcher"][0].children(recursive=True):
            found.setdefault(_role(process), []).append(process)
        return found


def _role(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    for part, role in (("shardserve.main", "main"), ("worker.stages", "stages"), ("shardserve.worker", "worker")):
        if part in command:
            return role
    parent = process.parent()
    forked = parent is not None and "fork_server" in " ".join(parent.cmdline())
    return "agent" if forked else "fork_server"


@contextlib.contextmanager
def up(folder: Path, name: str, *arguments: str, model_dir: Path | None = None, **environment: str) -> Iterator[Up]:
    """Serves folder/name with the shards of folder/model, on free ports of 127.0.0.1, until left."""
    grpc, rest, distributed = (f"127.0.0.1:{free_port()}" for _ in range(3))
    # A server is no child that its starter's death ends; that of a benchmark has nobody else to stop it (setpriv(1)).
    command = ["setpriv", "--pdeathsig", "TERM"]
    command += [sys.executable, "-m", "shardserve.cli", "up", str(folder), "--servable", name]
    command += ["--model-dir", str(model_dir or folder / "model"), "--grpc-address", grpc, "--rest-address", rest]
    command += ["--distributed-address", distributed, "--agent-start-port", str(free_port()), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"shardserve up did not get ready: {line!r}")
        yield Up(process, grpc, rest, time.perf_counter() - start)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def write_servable(folder: Path, name: str, inputs: str, outputs: str, **declared: Any) -> None:
    """folder/name/servable_config.py with one method `predict` of one model stage. declared: of declare_servable."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    arguments = ", ".join(f"{key}={value!r}" for key, value in declared.items())
    (folder / name / "servable_config.py").write_text(
        f"""from shardserve.server import distributed, register

model = distributed.declare_servable({arguments})


@register.register_method(output_names={outputs.split(", ")!r})
def predict({inputs}):
    return register.add_stage(model, {inputs}, outputs_count={len(outputs.split(", "))})
"""
    )
