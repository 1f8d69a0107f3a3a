"""`group_config.json`: what one shard is, what it takes and gives, and which files belong to it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from shardserve.errors import InvalidInput, ShardError
from shardserve.shards import files
from shardserve.shards.expressions import MAX_INTEGER, ExpressionError, evaluate, is_name, parse, parse_condition

FORMAT_VERSION = 2
"""What is written. 2 has `origins`, `flops`, `example_dims` and `state`."""
READABLE_VERSIONS = (1, FORMAT_VERSION)
CONFIG_FILE = "group_config.json"
WEIGHTS_FILE = "weights.safetensors"
GRAPH_SUFFIX = ".graph.json"

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
DTYPES = frozenset({"bool", *_INTEGERS, "float16", "bfloat16", "float32", "float64"})

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")

# So that a file can't make its reader count for ever.
MAX_RANKS = 65536


class DimRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes that a dynamic dim may have, both ends included; `max` None: no upper end."""

    min: int
    max: int | None = None

    def __post_init__(self) -> None:
        if self.min < 0 or (self.max is not None and self.max < self.min) or max(self.min, self.max or 0) > MAX_INTEGER:
            raise ValueError(f"not a range of sizes: {self}")

    def __contains__(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        return f"{self.min} to {self.max}" if self.max is not None else f"{self.min} or more"


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: `dtype` as "float32"; `shape` of integers and expressions over the signature's dims."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        # Names are printed: nothing in them may move a terminal's cursor.
        if not self.name or not self.name.isprintable():
            raise ValueError(f"{self.name!r} can't name a tensor")
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor '{self.name}' has the unknown dtype '{self.dtype}'")
        elements = 1
        for size in self.shape:
            if isinstance(size, str):
                parse(size)
            elif not 0 <= size <= MAX_INTEGER:
                raise ValueError(f"tensor '{self.name}' has the size {size}")
            else:
                elements *= max(size, 1)
        if elements > MAX_INTEGER // 8:  # of 8 bytes each
            raise ValueError(f"tensor '{self.name}' of shape {describe(self.shape)} is larger than any memory")

    @property
    def names(self) -> frozenset[str]:
        """The dims that its shape is written in."""
        return frozenset().union(*(parse(size).names for size in self.shape if isinstance(size, str)))


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What the whole model takes and gives. `conditions` hold for every input that it accepts."""

    dims: dict[str, DimRange]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for dim in self.dims:
            if not is_name(dim):
                raise ValueError(f"'{dim}' can't name a dim")
        for spec in (*self.inputs, *self.outputs):
            _known(f"tensor '{spec.name}'", spec.names, self.dims)
        for condition in self.conditions:
            _known(f"condition '{condition}'", parse_condition(condition).names, self.dims)
        for specs in (self.inputs, self.outputs):
            if len({spec.name for spec in specs}) < len(specs):
                raise ValueError(f"names are given twice: {', '.join(spec.name for spec in specs)}")

    @cached_property
    def _inputs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    def bind(self, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> dict[str, int]:
        """The sizes of the dynamic dims that inputs of these shapes and dtypes have.

        Raises InvalidInput, naming the input, the axis, what was expected and what came.
        """
        dims = self.measure(shapes, dtypes)
        if (refusal := self.refusal(dims)) is not None:
            raise InvalidInput(refusal)
        return dims

    def refusal(self, dims: Mapping[str, int]) -> str | None:
        """Which condition doesn't hold for these sizes, and for which; None if all do."""
        for condition in self.conditions:
            if not holds(condition, dims):
                sizes = ", ".join(f"{dim} = {size}" for dim, size in dims.items())
                return f"the inputs' sizes must satisfy {condition}, got {sizes}"
        return None

    def measure(self, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> dict[str, int]:
        """As `bind`, whatever the conditions say."""
        self._check_names(shapes)
        derived: list[tuple[str, int, str, int]] = []
        dims: dict[str, int] = {}
        origin: dict[str, str] = {}
        for spec in self.inputs:
            name, shape = spec.name, shapes[spec.name]
            if dtypes[name] != spec.dtype:
                raise InvalidInput(f"input '{name}' must have dtype {spec.dtype}, got {dtypes[name]}")
            if len(shape) != len(spec.shape):
                raise InvalidInput(f"input '{name}' must have shape {describe(spec.shape)}, got {list(shape)}")
            for axis, (expected, size) in enumerate(zip(spec.shape, shape, strict=True)):
                if isinstance(expected, int):
                    if expected != size:
                        raise InvalidInput(f"input '{name}' must have size {expected} at axis {axis}, got {size}")
                elif expected not in self.dims:
                    derived.append((name, axis, expected, size))
                elif expected not in dims:
                    self._check_range(expected, size, name, axis)
                    dims[expected], origin[expected] = size, f"'{name}' at axis {axis}"
                elif dims[expected] != size:
                    raise InvalidInput(
                        f"input '{name}' must have size {dims[expected]} at axis {axis} "
                        f"('{expected}', as input {origin[expected]}), got {size}"
                    )
        for name, axis, text, size in derived:
            self._bind_derived(name, axis, text, size, dims)
        return dims

    def resolve(self, spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that `spec` has with these dims."""
        return tuple(evaluate(size, dims) for size in spec.shape)

    def _check_names(self, given: Mapping[str, Sequence[int]]) -> None:
        takes = ", ".join(self._inputs)
        for name in self._inputs:
            if name not in given:
                raise InvalidInput(f"input '{name}' is missing; the model takes: {takes}")
        for name in given:
            if name not in self._inputs:
                raise InvalidInput(f"unknown input '{name}'; the model takes: {takes}")

    def _check_range(self, dim: str, size: int, name: str, axis: int) -> None:
        if size not in self.dims[dim]:
            raise InvalidInput(
                f"input '{name}' must have a size of {self.dims[dim]} at axis {axis} ('{dim}'), got {size}"
            )

    def _bind_derived(self, name: str, axis: int, text: str, size: int, dims: dict[str, int]) -> None:
        # A dim may appear only inside an expression (2*half): such expressions are linear in it, so it is solved for.
        expression = parse(text)
        try:
            unbound = expression.names - dims.keys()
            if len(unbound) == 1:
                (dim,) = unbound
                at_zero = expression.evaluate({**dims, dim: 0})
                slope = expression.evaluate({**dims, dim: 1}) - at_zero
                if slope:
                    solution = (size - at_zero) // slope
                    if expression.evaluate({**dims, dim: solution}) == size:
                        self._check_range(dim, solution, name, axis)
                        dims[dim] = solution
            expected = expression.evaluate(dims)
        except ExpressionError as error:  # a dim without a value, or a division by zero
            raise InvalidInput(
                f"input '{name}' must have a size of the form {text} at axis {axis}, got {size}"
            ) from error
        if expected != size:
            raise InvalidInput(f"input '{name}' must have size {expected} at axis {axis} ('{text}'), got {size}")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tensor that crosses a pipeline cut is in the whole model; nobody needs it to run the shards.

    `tensor` names it in the whole model's traced graph ("" where that isn't known), `module` is the innermost module
    that makes it. `placement`: "Replicate()" every rank has all of it, "Shard(d)" or "Shard(d, blocks=n)" its part of
    dim d, of each of n equal blocks or of blocks of the sizes "(a, b, …)"; "Partial(op)" a term of a reduction.
    """

    tensor: str = ""
    module: str = ""
    placement: str = ""

    def __post_init__(self) -> None:
        for text in (self.tensor, self.module, self.placement):
            if text and not text.isprintable():
                raise ValueError(f"{text!r} can't be an origin")


class ShardConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The group config of one local rank.

    `export_id` is the same for all ranks of one export and new each time. `receives` is what the program takes: the
    signature's inputs in stage 0, else what the same coordinate of the stage before sends. `sends` is what it gives:
    the signature's outputs in the last stage; `origins`, of each, in all other stages, and none in older files.
    `flops`: FLOPs of this rank's matrix products in a step, 2 for a multiplication with its addition, an integer or an
    expression over the dims; None: unknown. `example_dims`: the dims' sizes in the export's example inputs. `state`:
    the buffers that the rank keeps between steps, as it has them, by their names in the model; shards that have any run
    in stateful servables only. `state_id`: the same in subgraphs that were exported together, which share
    those buffers; empty: none do.
    """

    format_version: int
    export_id: str
    name: str
    rank_size: int
    stage_size: int
    rank: int
    signature: Signature
    receives: tuple[TensorSpec, ...]
    sends: tuple[TensorSpec, ...]
    graph_file: str
    graph_sha256: str
    weights_file: str
    weights_sha256: str
    parameter_bytes: int
    origins: tuple[Origin, ...] = ()
    flops: int | str | None = None
    example_dims: dict[str, int] = {}
    state: tuple[TensorSpec, ...] = ()
    state_id: str = ""

    def __post_init__(self) -> None:
        if not FILE_NAME.match(self.name):
            raise ValueError(f"'{self.name}' can't name a model")
        if self.rank_size > MAX_RANKS:
            raise ValueError(f"rank_size {self.rank_size} is more than {MAX_RANKS}")
        if self.stage_size < 1 or self.rank_size < 1 or self.rank_size % self.stage_size:
            raise ValueError(f"rank_size {self.rank_size} doesn't divide into stage_size {self.stage_size} stages")
        if not 0 <= self.rank < self.rank_size:
            raise ValueError(f"rank {self.rank} isn't one of rank_size {self.rank_size}")
        for file in (self.graph_file, self.weights_file):
            if not FILE_NAME.match(file):
                raise ValueError(f"'{file}' isn't a plain file name")
        for digest in (self.graph_sha256, self.weights_sha256):
            if not _SHA256.match(digest):
                raise ValueError(f"'{digest}' isn't a sha256")
        if not 0 <= self.parameter_bytes <= MAX_INTEGER:
            raise ValueError(f"parameter_bytes is {self.parameter_bytes}")
        if self.origins and len(self.origins) != len(self.sends):
            raise ValueError(f"has {len(self.origins)} origins of {len(self.sends)} tensors that are sent")
        if isinstance(self.flops, str):
            _known("flops", parse(self.flops).names, self.signature.dims)
        elif self.flops is not None and not 0 <= self.flops <= MAX_INTEGER:
            raise ValueError(f"flops is {self.flops}")
        _known("example_dims", frozenset(self.example_dims), self.signature.dims)
        if any(not 0 <= size <= MAX_INTEGER for size in self.example_dims.values()):
            raise ValueError(f"example_dims is {self.example_dims}")
        for spec in (*self.receives, *self.sends):
            _known(f"tensor '{spec.name}'", spec.names, self.signature.dims)

    @property
    def tensor_parallel_size(self) -> int:
        return self.rank_size // self.stage_size

    @property
    def stage(self) -> int:
        """The pipeline stage of this shard."""
        return self.rank // self.tensor_parallel_size

    @property
    def coordinate(self) -> int:
        """The tensor-parallel rank within the stage."""
        return self.rank % self.tensor_parallel_size

    @classmethod
    def load(cls, path: str | Path) -> ShardConfig:
        """Read a group_config.json; ShardError names the file and the field that is wrong."""
        source = str(path)
        return cls.from_dict(files.decode_json(files.read(path, files.CONFIG_LIMIT), source), source)

    @classmethod
    def from_dict(cls, content: Any, source: str = "group config") -> ShardConfig:
        """The config that `to_dict` gave; ShardError begins with `source`."""
        check_version(content, source)
        try:
            return msgspec.convert(content, cls)
        except (msgspec.ValidationError, ExpressionError) as error:
            raise ShardError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and integers, for JSON or msgpack."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content


def check_version(content: Any, source: str) -> None:
    """ShardError unless `content` is an object of this format's version."""
    if not isinstance(content, dict):
        raise ShardError(f"{source}: expected an object")
    version = content.get("format_version")
    if version not in READABLE_VERSIONS:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "it was written by a newer release: install that, or export again" if newer else "export again"
        reads = " and ".join(map(str, READABLE_VERSIONS))
        raise ShardError(f"{source}: format_version is {version!r}; this release reads {reads}; {remedy}")


def describe(shape: Sequence[int | str]) -> str:
    """A shape as people read it: [batch, 96]."""
    return f"[{', '.join(str(size) for size in shape)}]"


def holds(condition: str, dims: Mapping[str, int]) -> bool:
    """Whether these sizes satisfy the condition."""
    try:
        return bool(parse_condition(condition).evaluate(dims))
    except ExpressionError:  # a division by zero: the condition speaks of larger sizes
        return False


def _known(what: str, names: frozenset[str], dims: Mapping[str, DimRange]) -> None:
    unknown = names - dims.keys()
    if unknown:
        raise ValueError(f"{what} uses {', '.join(sorted(unknown))}, which isn't among the dims")
