"""Whole servers for the end-to-end tests: exports, `shardserve up`, clients, and what is left when all has ended."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from ports import free_ports

from shardserve.client import Client, status
from shardserve.export import Plan, export

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MARK = "TEST_MARK"


@functools.cache
def load_module(path: Path) -> ModuleType:
    """A module by its path: examples are scripts, not packages."""
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export_transformer(out: Path, tensor_parallel: int, pipeline_parallel: int) -> torch.nn.Module:
    folder = EXAMPLES / "transformer"
    model, args, options = load_module(folder / "net.py").example()
    export(
        model,
        args,
        name="transformer",
        out=out,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        plan=Plan.load(folder / "plan.json"),
        **options,
    )
    return model.eval()


def write_servable(folder: Path, name: str, declaration: str, inputs: str, outputs: str) -> Path:
    """folder/name/servable_config.py with one method `predict`; gives `folder`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "servable_config.py").write_text(
        f"""from shardserve.server import distributed, register

model = distributed.declare_servable({declaration})


@register.register_method(output_names={outputs.split(", ")!r})
def predict({inputs}):
    return register.add_stage(model, {inputs}, outputs_count={len(outputs.split(", "))})
"""
    )
    return folder


class Processes:
    """Starts scripts whose whole offspring can be found again by a mark in the environment."""

    def __init__(self, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark, **environment}
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, *command: object, cwd: Path | None = None, stdin: int | None = None, stderr: int | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=cwd,
        )
        self.started.append(process)
        return process

    def alive(self) -> dict[int, str]:
        """pid and command line of every living process with the mark."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def of(self, part: str) -> list[int]:
        """pids of the living processes whose command line has `part`."""
        return sorted(pid for pid, command in self.alive().items() if part in command)

    def wait_all_ended(self, seconds: float) -> None:
        """AssertionError with what is left."""
        deadline = time.monotonic() + seconds
        while alive := self.alive():
            self.wait_ended(alive, deadline - time.monotonic())
            for process in self.started:
                process.poll()

    def wait_ended(self, pids: Iterable[int], seconds: float = 60) -> None:
        """By pidfds; AssertionError with what is left."""
        deadline = time.monotonic() + seconds
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                try:
                    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                finally:
                    os.close(descriptor)
                assert ready, f"still alive after {seconds:.1f} s: {self.alive()}"

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


class Up(Processes):
    """`shardserve up`, ready when entered; killed with all it started when left, if it hasn't ended before."""

    stderr: int | None = None

    def __init__(self, directory: Path, model_dir: Path, name: str, *arguments: str, **environment: str) -> None:
        super().__init__(**environment)
        self.name = name
        ports = free_ports(3 + 16)
        self.grpc, self.rest, self.distributed = (f"127.0.0.1:{port}" for port in ports[:3])
        self.command = (
            *("-m", "shardserve.cli", "up", directory, "--servable", name, "--model-dir", model_dir),
            *("--grpc-address", self.grpc, "--rest-address", self.rest),
            *("--distributed-address", self.distributed, "--agent-start-port", ports[3], *arguments),
        )

    def __enter__(self) -> Up:
        self.process = self.start(*self.command, stderr=self.stderr)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready"):
            super().__exit__()
            raise AssertionError(f"not ready: {line!r}, exit code {self.process.returncode}")
        return self

    def client(self, **options: Any) -> Client:
        return Client(self.grpc, self.name, "predict", **options)

    def replica(self) -> dict[str, Any]:
        found: dict[str, Any] = status(self.grpc)["servables"][0]["replicas"][0]
        return found

    def pids(self) -> list[int]:
        """Of the agents, by rank."""
        return [rank["pid"] for rank in self.replica()["ranks"]]

    def fork_server(self) -> int:
        """Its pid; its agents, of this server's first replica, have the same command line."""
        (found,) = set(self.of("shardserve.agent.fork_server")) - set(self.pids())
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits until every process has ended; the exit code."""
        self.process.send_signal(number)
        return self.wait_stopped()

    def wait_stopped(self) -> int:
        """After a signal."""
        code = self.process.wait(60)
        self.wait_all_ended(20)
        return code


class Transformer:
    """The exported example of 2 x 2 ranks, and the unsharded model."""

    def __init__(self, folder: Path) -> None:
        self.model_dir = folder / "model"
        self.model: torch.nn.Module = export_transformer(self.model_dir, 2, 2)

    def up(self, **environment: str) -> Up:
        return Up(EXAMPLES / "transformer", self.model_dir, "transformer", **environment)


def token_ids(count: int, length: int, seed: int) -> torch.Tensor:
    """int64 [count, length], in the vocabulary."""
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def transformer_instances(ids: torch.Tensor) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{"ids": row.numpy(), "attention_mask": np.ones(len(row), np.int64)} for row in ids]


def transformer_reference(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(ids, torch.ones_like(ids)).numpy()
    return logits


def shared_memory_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def copy_matmul_example(folder: Path) -> Path:
    """The reference example without its exported model."""
    target = folder / "matmul_distributed"
    shutil.copytree(EXAMPLES / "matmul_distributed", target, ignore=shutil.ignore_patterns("model", "__pycache__"))
    return target
