"""Writes the shards: graph JSON, safetensors and group config of each local rank, put in place whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shardserve.errors import ExportError, ShardError
from shardserve.export.sharding.cut import StageGraph
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.sharding.propagate import Bound, Tensors
from shardserve.export.symbols import Printer
from shardserve.export.weights_file import Layout, write_weights
from shardserve.shards.config import (
    CONFIG_FILE,
    DTYPES,
    FORMAT_VERSION,
    GRAPH_SUFFIX,
    WEIGHTS_FILE,
    ShardConfig,
    Signature,
    TensorSpec,
)
from shardserve.shards.files import HIDDEN, OLD
from shardserve.shards.graph import GraphFile, Node, Parameter, State, dtype_name, encode_argument


def crossing_specs(names: Sequence[str], meaning: Tensors, printer: Printer) -> tuple[TensorSpec, ...]:
    """The specs of the tensors that cross a pipeline cut; ExportError for one that can't."""
    specs: list[TensorSpec] = []
    for name in names:
        shape, dtype = meaning[name][0], dtype_name(meaning[name][1])
        if dtype not in DTYPES:
            raise ExportError(f"'{name}' would cross a pipeline cut, and {dtype} can't: move the cut")
        try:
            specs.append(TensorSpec(name, dtype, printer.shape(shape)))
        except ExportError as error:
            raise ExportError(f"'{name}' would cross a pipeline cut: {error}: move the cut") from error
    return tuple(specs)


def state_specs(stage: StageGraph) -> tuple[TensorSpec, ...]:
    """What a rank keeps of the buffers that the model changes."""
    stored = [_stored(kept.bound, kept.bound.tensor) for kept in stage.state]
    try:
        return tuple(TensorSpec(tensor, dtype, shape) for _, tensor, dtype, shape in stored)
    except ValueError as error:
        raise ExportError(f"a buffer can't be kept between steps: {error}") from error


def graph_file(
    stage: StageGraph,
    meaning: Tensors,
    signature: Signature,
    printer: Printer,
    export_id: str,
    stored: Mapping[str, str],
    fills: Mapping[str, bool | int | float | None],
) -> GraphFile:
    """The graph file of one rank; `stored` gives each tensor's name in the weights file, `fills` the value of all
    elements of each kept buffer."""
    nodes: list[Node] = []
    for node in stage.nodes:
        shape = dtype = None
        if node.op.startswith("collective."):
            local, kind = meaning[node.sources[0]]
            shape, dtype = printer.shape(local), dtype_name(kind)
        try:
            args = [encode_argument(value) for value in node.args]
            kwargs = {key: encode_argument(value) for key, value in node.kwargs.items()}
        except TypeError as error:
            raise ExportError(
                f"{node.op} ('{node.name}') has an argument that shards can't express: {error}"
            ) from error
        nodes.append(Node(node.name, node.op, args, kwargs, shape, dtype))
    parameters = tuple(Parameter(*_stored(bound, stored[bound.tensor])) for bound in stage.parameters)
    state = tuple(
        State(*_stored(kept.bound, kept.bound.tensor), kept.update, fills[kept.bound.tensor]) for kept in stage.state
    )
    return GraphFile(
        format_version=FORMAT_VERSION,
        export_id=export_id,
        dims=tuple(signature.dims),
        inputs=stage.receives,
        parameters=parameters,
        nodes=tuple(nodes),
        outputs=stage.sends,
        state=state,
    )


def _stored(bound: Bound, tensor: str) -> tuple[str, str, str, tuple[int, ...]]:
    return bound.name, tensor, dtype_name(bound.dtype), tuple(int(size) for size in bound.shape)


def collectives(graph: GraphFile) -> list[tuple[object, ...]]:
    """What a rank does with its group, in order: all ranks of a stage must agree on it."""
    return [
        (node.op, node.args[1:], node.shape, node.dtype) for node in graph.nodes if node.op.startswith("collective.")
    ]


def part(tensor: Tensor, placement: Replicate | Shard, size: int, coordinate: int) -> Tensor:
    """A rank's part of a weight, contiguous on the CPU; where it is so already, no copy."""
    tensor = tensor.detach().cpu()
    if isinstance(placement, Shard):
        blocks, dim = placement.blocks, placement.dim
        apart = tensor.split_with_sizes(blocks, dim) if isinstance(blocks, tuple) else tensor.chunk(blocks, dim)
        parts = [block.chunk(size, dim)[coordinate] for block in apart]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor.resolve_conj().resolve_neg().contiguous()


@contextmanager
def folder_of(out: Path) -> Iterator[None]:
    """Makes `out`, and removes what it has made of it if nothing comes into it. ExportError if it can't be made, or
    nothing can be written there.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise ExportError(f"the shards can't be written to {out}: {error.strerror}") from error
        yield
    except BaseException:
        for folder in made:
            # What somebody else has put there in the meantime stays, and the folder with it.
            with suppress(OSError):
                folder.rmdir()
        raise


@dataclass(frozen=True)
class Written:
    """A rank's shard in a writer's folder; `config` has the files' checksums."""

    config: ShardConfig
    folder: Path


class Writer:
    """Writes all ranks of one export into a hidden folder of `out`, then puts the device folders in place.

    Where an exporter was killed, its hidden folder goes with the next export into `out`.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out, name
        out.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        with _locked(out):
            _remove_abandoned(out)
            self.folder = Path(tempfile.mkdtemp(prefix=HIDDEN, dir=out))
            self._lock.enter_context(_locked(self.folder))
        self.ranks: list[int] = []
        self._moved: list[tuple[Path, Path]] = []  # from, to; in order

    def write(
        self,
        config: ShardConfig,
        graph: GraphFile,
        layout: Layout,
        tensor: Callable[[str], Tensor],
        same: Written | None = None,
    ) -> Written:
        """Write one rank, with the tensors of `layout`, each asked for when its turn has come. `same`: what has these
        weights already.
        """
        folder = self.folder / f"device{config.rank}"
        folder.mkdir()
        content = graph.encode()
        (folder / config.graph_file).write_bytes(content)
        if same is None:
            weights_sha256, parameter_bytes = write_weights(folder / config.weights_file, layout, tensor)
        else:
            _link(same.folder / same.config.weights_file, folder / config.weights_file)
            weights_sha256, parameter_bytes = same.config.weights_sha256, same.config.parameter_bytes
        config = msgspec.structs.replace(
            config,
            graph_sha256=hashlib.sha256(content).hexdigest(),
            weights_sha256=weights_sha256,
            parameter_bytes=parameter_bytes,
        )
        content = msgspec.json.format(msgspec.json.encode(config), indent=2)
        (folder / CONFIG_FILE).write_bytes(content + b"\n")
        self.ranks.append(config.rank)
        return Written(config, folder)

    def flush(self) -> None:
        """To the disk with what was written, before any of it is put in place."""
        for path in [*self.folder.glob("device*/*"), *self.folder.glob("device*")]:
            _flush(path)

    def commit(self) -> None:
        """Replace the device folders of an earlier export, those of ranks that are no more included. If it raises,
        `restore` makes that undone.
        """
        old = self.folder / OLD
        old.mkdir()
        replaced: set[str] = set()
        for rank in self.ranks:
            target = self.out / f"device{rank}"
            if target.exists():
                if (config := _config(target)) is not None:
                    replaced.add(config.export_id)
                self._move(target, old / target.name)
            self._move(self.folder / target.name, target)
        # An export is replaced whole: those of its ranks that are no more would be half of a model.
        for path in list(self.out.glob("device*")):
            config = _config(path)
            if config is None or path.name != f"device{config.rank}" or config.rank in self.ranks:
                continue
            if config.name == self.name or config.export_id in replaced:
                self._move(path, old / path.name)

    def restore(self) -> None:
        """Put back in place what `commit` has replaced."""
        while self._moved:
            here, there = self._moved[-1]
            there.rename(here)
            self._moved.pop()

    def accept(self) -> None:
        """What `commit` has replaced isn't wanted any more."""
        self._moved.clear()

    def discard(self) -> None:
        """Remove what isn't in place, but former shards that couldn't be put back."""
        if not self._moved:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _move(self, here: Path, there: Path) -> None:
        here.rename(there)
        self._moved.append((here, there))


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Nobody else has this folder locked in it; BlockingIOError if somebody has, and `wait` is False."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(out: Path) -> None:
    """The hidden folders of exporters that have ended, unless they hold former shards."""
    for folder in out.glob(f"{HIDDEN}*"):
        if not any(folder.glob(f"{OLD}/*")):
            with suppress(BlockingIOError), _locked(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)


def commit(writers: Sequence[Writer]) -> None:
    """Put in place what several writers have written: all of it, or nothing and an ExportError."""
    try:
        for writer in writers:
            writer.flush()
        with ExitStack() as stack:
            for writer in writers:
                stack.callback(writer.restore)
                writer.commit()
            stack.pop_all()
    except OSError as error:
        raise ExportError(f"the shards can't be put in place: {error}") from error
    for writer in writers:
        writer.accept()


def empty_config(
    name: str,
    export_id: str,
    state_id: str,
    signature: Signature,
    rank: int,
    rank_size: int,
    stage_size: int,
    receives: tuple[TensorSpec, ...],
    sends: tuple[TensorSpec, ...],
    state: tuple[TensorSpec, ...],
) -> ShardConfig:
    """A rank's config before its files are written."""
    nothing = hashlib.sha256().hexdigest()
    return ShardConfig(
        format_version=FORMAT_VERSION,
        export_id=export_id,
        name=name,
        rank_size=rank_size,
        stage_size=stage_size,
        rank=rank,
        signature=signature,
        receives=receives,
        sends=sends,
        graph_file=f"{name}{GRAPH_SUFFIX}",
        graph_sha256=nothing,
        weights_file=WEIGHTS_FILE,
        weights_sha256=nothing,
        parameter_bytes=0,
        state=state,
        state_id=state_id,
    )


def _link(there: Path, here: Path) -> None:
    try:
        here.hardlink_to(there)
    except OSError:  # a file system without hard links
        shutil.copyfile(there, here)


def _config(folder: Path) -> ShardConfig | None:
    """That of the shard in a folder; None if there is none."""
    try:
        return ShardConfig.load(folder / CONFIG_FILE)
    except ShardError:
        return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
