"""Several hosts on this one: network namespaces with an address each, on a bridge that nothing else sees."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serving import MARK, Processes

from shardserve.client import Client, status

NO_SKIP = "TESTS_NO_SKIP"
PREFIX = "10.231.7"
START_SECONDS = 120
_numbers = itertools.count()


def need_hosts() -> None:
    """Skips where namespaces can't be made; with TESTS_NO_SKIP=1 it fails instead."""
    reason = None
    if os.geteuid() != 0:
        reason = "network namespaces need root"
    elif shutil.which("ip") is None:
        reason = "network namespaces need iproute2 (make system-packages)"
    else:
        probe = f"ss-probe-{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
        if made.returncode == 0:
            subprocess.run(["ip", "netns", "del", probe], check=True)
        else:
            reason = f"network namespaces can't be made: {made.stderr.strip()}"
    if reason is None:
        return
    if os.environ.get(NO_SKIP) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Hosts:
    """`with Hosts(3) as hosts`: hosts 0, 1, 2 with the addresses hosts.address(0)…; removed when left."""

    def __init__(self, count: int) -> None:
        self._base = f"ss{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._base}-sw"
        self._names = [f"{self._base}-h{i}" for i in range(count)]

    def address(self, host: int) -> str:
        return f"{PREFIX}.{host + 1}"

    def __enter__(self) -> Hosts:
        _remove_orphans()
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge", "up")
            for i, name in enumerate(self._names):
                ip("netns", "add", name)
                ip("-n", self._switch, "link", "add", f"p{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", self._switch, "link", "set", f"p{i}", "master", "bridge", "up")
                ip("-n", name, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def command(self, host: int) -> tuple[str, ...]:
        """What runs the rest of a command line on this host, in the same process."""
        return ("ip", "netns", "exec", self._names[host])

    def add_address(self, host: int, address: str) -> None:
        ip("-n", self._names[host], "address", "add", f"{address}/24", "dev", "eth0")

    def cut(self, host: int) -> None:
        """No packet reaches the host or leaves it; it is not told."""
        ip("-n", self._switch, "link", "set", f"p{host}", "nomaster")

    def mend(self, host: int) -> None:
        ip("-n", self._switch, "link", "set", f"p{host}", "master", "bridge")


def _remove_orphans() -> None:
    """Namespaces of test runs that were killed before they could remove theirs."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.strip()]:
        made = re.fullmatch(r"ss([0-9]+)-[0-9]+-(?:sw|h[0-9]+)", name)
        if made is not None and not Path(f"/proc/{made[1]}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class OnHosts(Processes):
    """`shardserve serve` on host 0 and `shardserve agents` on others; killed with all they started when left."""

    def __init__(self, hosts: Hosts, folder: Path, **environment: str) -> None:
        super().__init__(**environment)
        self.hosts = hosts
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self.grpc = f"unix:{folder}/grpc.sock"
        self.distributed = f"{hosts.address(0)}:6200"
        self._ready: set[int] = set()

    def run(self, host: int, *command: object) -> subprocess.Popen[str]:
        """`python -m shardserve.cli COMMAND…` on the host; its errors go to a file."""
        log = open(self.log(len(self.started)), "w")  # noqa: SIM115
        with log:
            process = subprocess.Popen(
                [*self.hosts.command(host), sys.executable, "-m", "shardserve.cli", *map(str, command)],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.started.append(process)
        return process

    def log(self, number: int) -> Path:
        """What the process that was started as this one, counted from 0, and its children wrote to stderr."""
        return self._folder / f"{number}.log"

    def serve(self, directory: Path, table: Path, *arguments: object) -> subprocess.Popen[str]:
        fronts = ("--grpc-address", self.grpc, "--rest-address", "127.0.0.1:1500")
        listens = ("--distributed-address", self.distributed)
        return self.run(0, "serve", directory, "--rank-table", table, *fronts, *listens, *arguments)

    def agents(self, host: int, files: list[Path], *arguments: object) -> subprocess.Popen[str]:
        return self.run(host, "agents", *files, "--distributed-address", self.distributed, *arguments)

    def wait_ready(self, *processes: subprocess.Popen[str]) -> None:
        for process in processes:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
            line = process.stdout.readline() if readable else ""
            assert line.startswith("ready"), f"{line!r}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted(self._folder.glob("*.log")))

    def client(self, name: str, **options: Any) -> Client:
        return Client(self.grpc, name, "predict", **options)

    def replica(self) -> dict[str, Any]:
        found: dict[str, Any] = status(self.grpc)["servables"][0]["replicas"][0]
        return found

    def pids(self) -> list[int]:
        return [rank["pid"] for rank in self.replica()["ranks"]]

    def wait_in_log(self, number: int, text: str, seconds: float = 60) -> None:
        """Until that process, or a child of it, has written the text."""
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            tail = subprocess.Popen(
                ["tail", "-n", "+1", "-f", str(self.log(number))],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, MARK: self.mark},
            )
            stack.callback(tail.wait)
            stack.callback(tail.kill)
            assert tail.stdout is not None
            stack.callback(tail.stdout.close)
            seen = ""
            while text not in seen:
                left = deadline - time.monotonic()
                readable, _, _ = select.select([tail.stdout], [], [], max(0.0, left))
                assert readable, f"{text!r} is not in\n{self.logs()}"
                seen += os.read(tail.stdout.fileno(), 65536).decode(errors="replace")
