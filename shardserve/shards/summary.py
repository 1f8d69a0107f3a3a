"""What the shards of an export hold, do and send, from their configs and graphs; the weights aren't read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardserve.errors import InvalidInput, ShardError
from shardserve.progress import Progress, quietly
from shardserve.shards import files
from shardserve.shards.config import CONFIG_FILE, Origin, ShardConfig, TensorSpec
from shardserve.shards.expressions import ExpressionError, evaluate
from shardserve.shards.files import HIDDEN, OLD
from shardserve.shards.graph import GraphFile, Parameter, to_dtype
from shardserve.shards.weights import check_digest


@dataclass(frozen=True)
class Sent:
    """A tensor that a rank sends in a step; `origin` is None where it is an output or the shard doesn't say."""

    spec: TensorSpec
    bytes: int
    origin: Origin | None


@dataclass(frozen=True)
class Collective:
    """A collective of a step, with the bytes that a rank gives to it."""

    kind: str
    bytes: int


@dataclass(frozen=True)
class RankSummary:
    """One shard, at the sizes of its export's summary. `flops`: None where the shard doesn't say."""

    directory: Path
    config: ShardConfig
    parameters: tuple[Parameter, ...]
    operators: int
    collectives: tuple[Collective, ...]
    sends: tuple[Sent, ...]
    flops: int | None

    @property
    def stored(self) -> Mapping[str, Parameter]:
        """The tensors of the weights file, by name: tied parameters are one."""
        return {parameter.tensor: parameter for parameter in self.parameters}

    @property
    def parameter_count(self) -> int:
        """The elements of those tensors."""
        return sum(math.prod(parameter.shape) for parameter in self.stored.values())

    @property
    def collective_counts(self) -> Counter[str]:
        """How many collectives of each kind a step issues."""
        return Counter(collective.kind for collective in self.collectives)

    @property
    def collective_bytes(self) -> int:
        """What the rank gives to all of them."""
        return sum(collective.bytes for collective in self.collectives)

    @property
    def state_bytes(self) -> int:
        """The bytes of the buffers that the rank keeps between steps."""
        return sum(tensor_bytes(spec.shape, spec.dtype, {}) for spec in self.config.state)

    @property
    def sent_bytes(self) -> int:
        return sum(sent.bytes for sent in self.sends)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "directory": str(self.directory),
            "config": self.config.to_dict(),
            "stage": self.config.stage,
            "rank": self.config.rank,
            "parameters": [
                {"name": name, "dtype": parameter.dtype, "shape": parameter.shape, "bytes": parameter_bytes(parameter)}
                for name, parameter in self.stored.items()
            ],
            "parameter_count": self.parameter_count,
            "parameter_bytes": self.config.parameter_bytes,
            "state_bytes": self.state_bytes,
            "flops": self.flops,
            "operators": self.operators,
            "collectives": dict(self.collective_counts),
            "collective_bytes": self.collective_bytes,
            "sends": [{"name": sent.spec.name, "bytes": sent.bytes} for sent in self.sends],
        }


@dataclass(frozen=True)
class Summary:
    """An export at these sizes of its dims; `sizes_of` says whose they are: given, the example's, the smallest.
    `others`: folders of further devices that are beside its own, of no rank of it.
    """

    ranks: tuple[RankSummary, ...]
    dims: Mapping[str, int]
    sizes_of: str
    others: tuple[Path, ...] = ()

    @property
    def first(self) -> ShardConfig:
        return self.ranks[0].config

    @property
    def stages(self) -> list[Sequence[RankSummary]]:
        """The ranks of each pipeline stage."""
        size = self.first.tensor_parallel_size
        return [self.ranks[start : start + size] for start in range(0, len(self.ranks), size)]


def read(directory: str | Path, given: Mapping[str, int] | None = None, progress: Progress = quietly) -> Summary:
    """Summarize the export in a folder that holds device0, device1, …; `given` are sizes of its dims.

    Dims that aren't given have the example's size, or their smallest. ShardError for files that aren't of one export,
    InvalidInput for sizes that the model doesn't take.
    """
    directory = Path(directory)
    first = directory / "device0" / CONFIG_FILE
    if not first.is_file():
        inside = sorted(path.parts[-3] for path in directory.glob(f"[!.]*/device0/{CONFIG_FILE}"))
        hint = f"; it holds those of {', '.join(inside)}: name one" if inside else _interrupted(directory)
        raise ShardError(f"there is no {first}: {directory} is not the folder of an export{hint}")
    config = ShardConfig.load(first)
    dims = sizes(config, given or {})
    ranks: list[RankSummary] = []
    for rank in range(config.rank_size):
        progress("reading shards", rank, config.rank_size)
        folder = directory / f"device{rank}"
        if not folder.is_dir():
            raise ShardError(f"there is no {folder}, of {config.rank_size} ranks{_interrupted(directory)}")
        summary = _rank(folder, dims)
        if summary.config.export_id != config.export_id:
            raise ShardError(f"{folder} and {first.parent} are of different exports{_interrupted(directory)}")
        if summary.config.rank != rank:
            raise ShardError(f"{summary.directory} holds the shard of rank {summary.config.rank}")
        ranks.append(summary)
    own = {rank.directory.name for rank in ranks}
    others = sorted(path for path in directory.glob("device[0-9]*") if path.is_dir() and path.name not in own)
    return Summary(tuple(ranks), dims, _whose(config, given or {}), tuple(others))


def _interrupted(directory: Path) -> str:
    """What to do about an export that was killed while it put its folders in place; nothing if none was."""
    former = sorted({path.parent for path in directory.glob(f"{HIDDEN}*/{OLD}/device*")})
    if not former:
        return ""
    return f"; an export was killed while it put its own in place: export again, or move back what is in {former[0]}"


def sizes(config: ShardConfig, given: Mapping[str, int]) -> dict[str, int]:
    """A size of each dim: that given, the example's, or the smallest."""
    signature = config.signature
    for name, size in given.items():
        if name not in signature.dims:
            raise InvalidInput(f"there is no dim '{name}'; the model has {', '.join(signature.dims) or 'none'}")
        if size not in signature.dims[name]:
            raise InvalidInput(f"dim '{name}' must be {signature.dims[name]}, got {size}")
    smallest = {name: limits.min for name, limits in signature.dims.items()}
    chosen = {**smallest, **config.example_dims, **given}
    if given:
        shapes = {spec.name: signature.resolve(spec, chosen) for spec in signature.inputs}
        signature.bind(shapes, {spec.name: spec.dtype for spec in signature.inputs})
    return chosen


def _whose(config: ShardConfig, given: Mapping[str, int]) -> str:
    if given.keys() == config.signature.dims.keys() or not config.signature.dims:
        return "given"
    rest = "the example's sizes" if config.example_dims else "the smallest sizes"
    return f"given, else {rest}" if given else rest


def _rank(directory: Path, dims: Mapping[str, int]) -> RankSummary:
    config = ShardConfig.load(directory / CONFIG_FILE)
    file = directory / config.graph_file
    content = files.read(file, files.GRAPH_LIMIT)
    check_digest(file, hashlib.sha256(content).hexdigest(), config.graph_sha256)
    graph = GraphFile.decode(content, str(file))
    try:
        issued = [node for node in graph.nodes if node.op.startswith("collective.")]
        return RankSummary(
            directory=directory,
            config=config,
            parameters=graph.parameters,
            operators=len(graph.nodes) - len(issued),
            collectives=tuple(
                Collective(node.op.partition(".")[2], tensor_bytes(node.shape or (), node.dtype or "", dims))
                for node in issued
            ),
            sends=tuple(
                Sent(spec, tensor_bytes(spec.shape, spec.dtype, dims), origin)
                for spec, origin in zip(config.sends, config.origins or [None] * len(config.sends), strict=True)
            ),
            flops=None if config.flops is None else evaluate(config.flops, dims),
        )
    except (ShardError, ExpressionError) as error:
        raise ShardError(f"{file}: {error}") from error


def tensor_bytes(shape: Sequence[int | str], dtype: str, dims: Mapping[str, int]) -> int:
    """The bytes of a tensor at these sizes of the dims."""
    return math.prod(evaluate(size, dims) for size in shape) * to_dtype(dtype).itemsize


def parameter_bytes(parameter: Parameter) -> int:
    """The bytes of a parameter."""
    return tensor_bytes(parameter.shape, parameter.dtype, {})
