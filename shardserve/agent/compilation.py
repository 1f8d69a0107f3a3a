"""Compiles a shard's graph on the host that serves it, beside the steps, and swaps when the code is ready.

What is compiled are the graph's regions (shards.regions); collectives and lookups between them run as without. The code
assumes of each dim either that it is 1 or that it is at least 2: a *variant*. The one where all are at least 2 is
compiled when the agent starts, each other when a step first asks for it. Until then, and where a variant's conditions
don't hold, steps run eager.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import queue
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import fx

from shardserve.shards.config import CONFIG_FILE
from shardserve.shards.expressions import parse_condition
from shardserve.shards.program import Forward, Program
from shardserve.shards.regions import Run, find_regions, region_graph, replace_regions

logger = logging.getLogger(__name__)

# Combinations of sizes whose variant is remembered; then all are forgotten.
REMEMBERED = 1024

# Headers compiled beforehand take 9 s for each variant and spare each region 2; few shards have five that differ. In
# half precision each operator rounds as eager: ranks, of which one may still be eager, choose the same experts, and
# what float16 can't hold is infinite.
OPTIONS: dict[str, str | int | bool] = {"aot_inductor.precompile_headers": False, "emulate_precision_casts": True}


Order = tuple[int, ...]
"""The dims of a dense tensor, from the one whose elements lie farthest apart in memory."""


class CompilationError(Exception):
    """Why steps stay eager."""


class Manifest(msgspec.Struct, frozen=True):
    """A variant: its library for each region, in order, by `library_name`, and the conditions of the dims under which
    it may be used. orders: of each region's inputs, how the library takes it (see `laid_out`). regions: each by its
    `region_name`."""

    libraries: tuple[str, ...]
    conditions: tuple[str, ...]
    orders: tuple[tuple[Order | None, ...], ...]
    regions: tuple[str, ...]

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def manifest_name(ones: frozenset[str]) -> str:
    """The file of the variant in which these dims are 1."""
    return "-".join(["manifest", *sorted(ones)]) + ".json"


def library_name(path: Path) -> str:
    """Of the library in this file: the checksum of what is in it, so that a damaged one doesn't have its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest() + ".so"


def region_name(region: fx.GraphModule) -> str:
    """Of its code and how it is compiled: another release may do both otherwise for the same graph."""
    return hashlib.sha256(f"{region.code}{OPTIONS}".encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """CompilationError names the file, the manifest or one of its libraries, that isn't there or is damaged.

    To be looked at before a library is loaded: a shortened one ends the process that loads it, by SIGBUS.
    """
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        for name in sorted(set(manifest.libraries)):
            path = path.with_name(name)
            if library_name(path) != name:
                raise CompilationError(f"{path}: is damaged")
    except msgspec.DecodeError as error:
        raise CompilationError(f"{path}: is damaged: {error}") from error
    except OSError as error:
        raise CompilationError(f"{path}: {error.strerror}") from error
    return manifest


def described(graph_file: str, dims: Sequence[str], ones: frozenset[str]) -> str:
    """The variant, as users know the graph and its dims: `DIR/net.graph.json with batch >= 2`."""
    sizes = ", ".join(f"{dim} {'= 1' if dim in ones else '>= 2'}" for dim in dims)
    return f"{graph_file} with {sizes}" if sizes else graph_file


def cache_folder(graph_sha256: str, threads: int, environment: Mapping[str, str] = os.environ) -> Path:
    """$XDG_CACHE_HOME/shardserve/compiled/KEY, made if it isn't there. The key has the graph, torch's version, the
    CPU's features and the threads. CompilationError if it isn't this user's alone: code is loaded from it.
    """
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    with contextlib.suppress(OSError):
        os.makedirs(home, 0o700, exist_ok=True)
    key = f"{graph_sha256[:32]}-torch{torch.__version__}-{_cpu()}-{threads}"
    folder = Path(home)
    for name in ("shardserve", "compiled", key):
        folder = folder / name
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700)
            status = folder.lstat()
        except OSError as error:
            raise CompilationError(f"{folder}: {error.strerror}") from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise CompilationError(f"{folder} has to be a directory that this user owns and nobody else may write to")
    return folder


def _cpu() -> str:
    features = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        features += sorted({line for line in file if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("".join(features).encode()).hexdigest()[:16]


class Compilation:
    """Of one Program, whose `compiled` it becomes. Its thread waits for compilers, and ends with the process."""

    def __init__(self, program: Program, graph_file: str, config_file: str | None, threads: int) -> None:
        self._program = program
        self._files = graph_file, config_file or os.fspath(Path(graph_file).with_name(CONFIG_FILE))
        self._threads = threads
        self._dims = program.dims
        self._wanted: queue.SimpleQueue[frozenset[str]] = queue.SimpleQueue()
        self._asked: set[frozenset[str]] = set()
        self._ready: dict[frozenset[str], tuple[Forward, Manifest]] = {}
        self._known: dict[tuple[int, ...], Forward | None] = {}

    def start(self) -> None:
        """Begins to compile; a warning says why not, if it can't be."""
        compiler = os.environ.get("CXX", "g++")
        if self._program.device.type != "cpu":
            logger.warning(
                "steps stay eager: compile=inductor is for the CPU, this rank is on %s", self._program.device
            )
        elif shutil.which(compiler) is None:
            logger.warning("steps stay eager: compile=inductor needs the C++ compiler %s; install g++", compiler)
        else:
            ranges = self._program.config.signature.dims
            self._want(frozenset(dim for dim in self._dims if ranges[dim].max == 1))
            threading.Thread(target=self._work, name="compilation", daemon=True).start()
            self._program.compiled = self.choose

    def choose(self, sizes: tuple[int, ...]) -> Forward | None:
        """The compiled graph for these sizes of the dims, if there is one by now."""
        try:
            return self._known[sizes]
        except KeyError:
            return self._find(sizes)

    def _find(self, sizes: tuple[int, ...]) -> Forward | None:
        dims = dict(zip(self._dims, sizes, strict=True))
        ones = frozenset(dim for dim, size in dims.items() if size == 1)
        found: Forward | None = None
        if ones in self._ready:
            forward, manifest = self._ready[ones]
            if all(parse_condition(condition).evaluate(dims) for condition in manifest.conditions):
                found = forward
        elif 0 not in sizes:
            self._want(ones)
            # Not remembered: it will be there some time.
            return None
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[sizes] = found
        return found

    def _want(self, ones: frozenset[str]) -> None:
        if ones not in self._asked:
            self._asked.add(ones)
            self._wanted.put(ones)

    def _work(self) -> None:
        while True:
            self.prepare(self._wanted.get())

    def prepare(self, ones: frozenset[str]) -> None:
        """Compiles or finds the variant in which these dims are 1, for steps from now on; a warning says why not."""
        rank = self._program.config.rank
        try:
            folder = cache_folder(self._program.config.graph_sha256, self._threads)
            # The load, too: whoever finds something damaged empties the folder.
            with _alone(folder.parent):
                manifest = self._compiled(folder, ones)
                self._ready[ones] = self._load(folder, manifest), manifest
        except (CompilationError, OSError) as error:
            logger.warning("rank %d: steps stay eager: %s", rank, error)
        except Exception:
            # Whatever it was, the graph itself runs as well.
            logger.warning("rank %d: steps stay eager", rank, exc_info=True)
        else:
            logger.info(
                "rank %d: steps are compiled from now on: %s", rank, described(self._files[0], self._dims, ones)
            )

    def _compiled(self, folder: Path, ones: frozenset[str]) -> Manifest:
        target = folder / manifest_name(ones)
        if target.exists():
            try:
                return self._read(target)
            except CompilationError as error:
                logger.warning("rank %d: is compiled anew: %s", self._program.config.rank, error)
                # All of it: what inductor left there, and would take again, may be damaged as well.
                shutil.rmtree(folder)
                folder.mkdir(0o700, exist_ok=True)
        self._run_compiler(folder, ones, target.with_suffix(".log"))
        return self._read(target)

    def _read(self, path: Path) -> Manifest:
        """As read_manifest; it has to be of the regions that this process makes, too."""
        manifest = read_manifest(path)
        graph, count = self._program.graph, len(self._dims)
        alone = [region_graph(graph, count, region) for region in find_regions(graph, count)]
        if manifest.regions != tuple(region_name(fx.GraphModule(torch.nn.Module(), each)) for each in alone):
            raise CompilationError(f"{path}: is of another release")
        return manifest

    def _run_compiler(self, folder: Path, ones: frozenset[str], log: Path) -> None:
        arguments = [*self._files, os.fspath(folder), str(self._threads), ",".join(sorted(ones)), str(os.getpid())]
        # Whatever a compiler that was killed has left goes when the next one starts; under the lock there is no other.
        scratch = folder.parent / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(0o700, exist_ok=True)
        environment = {
            **os.environ,
            "TMPDIR": os.fspath(scratch),
            "TORCHINDUCTOR_CACHE_DIR": os.fspath(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        with open(log, "wb") as output:
            code = subprocess.run(
                [sys.executable, "-m", "shardserve.agent.compile_shard", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # The compiler ends its own group when this process does.
                start_new_session=True,
                check=False,
            ).returncode
        if code:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise CompilationError(f"the compiler of {self._files[0]} ended with {code}: {last} (more in {log})")

    def _load(self, folder: Path, manifest: Manifest) -> Forward:
        runs = {name: load_library(folder / name) for name in set(manifest.libraries)}
        count = len(self._dims)
        regions = find_regions(self._program.graph, count)
        ordered = [
            laid_out(runs[name], count, orders)
            for name, orders in zip(manifest.libraries, manifest.orders, strict=True)
        ]
        graph = replace_regions(self._program.graph, count, regions, ordered)
        forward: Forward = fx.GraphModule(torch.nn.Module(), graph).forward
        return forward


def load_library(path: Path) -> Run:
    """CompilationError names the file."""
    try:
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(os.fspath(path), 1)
    except RuntimeError as error:
        why = str(error).partition("\n")[0].removeprefix(f"Error in dlopen: {path}: ")
        raise CompilationError(f"{path} can't be loaded: {why}") from error

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        results: list[torch.Tensor] = runner.run(tensors)
        return results

    return run


def laid_out(run: Run, first: int, orders: Sequence[Order | None]) -> Run:
    """`run`, for inputs that may lie otherwise in memory than it takes for granted, and would be misread: what some
    operators give has other strides than what they give without data, by which it was compiled. orders: of the tensors
    from `first` on; None: that one lies as it should.
    """
    checked = [
        (position, order, order == tuple(range(len(order))), [order.index(dim) for dim in range(len(order))])
        for position, order in enumerate(orders, first)
        if order is not None
    ]
    if not checked:
        return run

    def lay_out(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        for position, order, straight, back in checked:
            tensor = tensors[position] if straight else tensors[position].permute(order)
            if not tensor.is_contiguous():
                tensors[position] = tensor.contiguous().permute(back)
        return run(tensors)

    return lay_out


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One compiler at a time on a host, of which each takes a gigabyte; agents of an equal graph share the result."""
    with open(folder / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
