"""Builds the graph of one rank: values with placements, calls, and the collectives that change a placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from shardserve.errors import ExportError
from shardserve.export.sharding.placements import Partial, Placement, Replicate, Shard
from shardserve.export.symbols import Dim, Printer, divide
from shardserve.shards import operators
from shardserve.shards.graph import Device, Ref, Size, dtype_name


class Unplaceable(ExportError):
    """A placement that doesn't divide somewhere."""


@dataclass(frozen=True)
class Value:
    """A tensor of the model on this rank: its name in the graph, whole shape, dtype and placement."""

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    placement: Placement

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Scalar:
    """A number that isn't an integer expression over the dims: computed by a node of the graph."""

    name: str


@dataclass(frozen=True)
class LocalNode:
    """A node of one rank's graph; `shape`, local, is None for numbers and for operators with several results."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[Dim, ...] | None
    dtype: torch.dtype | None
    stage: int
    from_data: bool  # whether it depends on the inputs' values; what doesn't is computed again in each stage
    beside: tuple[str, ...] = ()  # what only other ranks take here: made on this one too, so that all do the same

    @property
    def sources(self) -> list[str]:
        """The names of the values that it takes, then of those beside."""
        found: list[str] = []

        def walk(value: Any) -> None:
            if isinstance(value, Ref):
                found.append(value.name)
            elif isinstance(value, (list, tuple)):
                for item in value:
                    walk(item)

        walk(self.args)
        walk(list(self.kwargs.values()))
        return [*found, *self.beside]


@dataclass
class Emitter:
    """The graph of tensor-parallel rank `coordinate` of `size`, in the making."""

    size: int
    coordinate: int
    printer: Printer
    stage: int = 0
    nodes: list[LocalNode] = field(default_factory=list)
    from_data: dict[str, bool] = field(default_factory=dict)
    gathered: dict[str, int] = field(default_factory=dict)  # operator → how often its sharded inputs had to be gathered
    together: set[str] = field(default_factory=set)  # values that a collective is needed for
    _cache: dict[tuple[str, Placement], Value] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)

    def local_shape(self, shape: Sequence[Dim], placement: Placement) -> tuple[Dim, ...]:
        """What a rank holds of a tensor of this whole shape; Unplaceable where that doesn't divide."""
        local = list(shape)
        if isinstance(placement, Shard):
            part = divide(local[placement.dim], self.size)
            if part is None or (
                isinstance(placement.blocks, tuple) and not placement.divides(part * self.size, self.size)
            ):
                raise self.unplaceable(shape, placement)
            local[placement.dim] = part
        return tuple(local)

    def unplaceable(self, shape: Sequence[Dim], placement: Placement) -> Unplaceable:
        return Unplaceable(f"{list(shape)} as {placement} doesn't divide into {self.size} ranks")

    def unique(self, name: str) -> str:
        """`name`, or with a number if it is taken."""
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else self.unique(f"{name}_{count}")

    def declare(self, name: str, shape: Sequence[Dim], dtype: torch.dtype, placement: Placement, data: bool) -> Value:
        """An input or a parameter of the graph."""
        name = self.unique(name)
        self.from_data[name] = data
        return Value(name, tuple(shape), dtype, placement)

    def call(
        self,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shape: Sequence[Dim],
        dtype: torch.dtype,
        placement: Placement,
        name: str | None = None,
        beside: Sequence[Value] = (),
    ) -> Value:
        """Append a call; `shape` is the whole result's, `args` are what this rank passes, `beside` what others do."""
        local = self.local_shape(shape, placement)
        # What neither crosses a cut nor needs a collective, only those that take it have.
        alike = tuple(value.name for value in beside if self.from_data[value.name] or value.name in self.together)
        node = self._append(name or op.split(".")[1], op, args, kwargs, local, dtype, alike)
        return Value(node.name, tuple(shape), dtype, placement)

    def call_many(
        self,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        results: Sequence[tuple[Sequence[Dim], torch.dtype]],
        placements: Sequence[Placement],
        name: str,
    ) -> list[Value]:
        """Append a call with several results, and take each of them, so that single tensors cross a pipeline cut."""
        source = self._append(name, op, args, kwargs, None, None)
        return [
            self.call("getitem", (Ref(source.name), index), {}, shape, dtype, placement, f"{source.name}_item{index}")
            for index, ((shape, dtype), placement) in enumerate(zip(results, placements, strict=True))
        ]

    def scalar(self, op: str, args: Sequence[Any], name: str) -> Scalar:
        """Append arithmetic on numbers."""
        return Scalar(self._append(name, op, args, {}, None, None).name)

    def reduced(self, value: Value) -> Value:
        """`value`, whole or sharded: a pending reduction is done."""
        return self.redistribute(value, Replicate()) if isinstance(value.placement, Partial) else value

    def replicated(self, value: Value) -> Value:
        return self.redistribute(value, Replicate())

    def was_gathered(self, value: Value) -> bool:
        """Whether every rank has the whole of a sharded value already."""
        return isinstance(value.placement, Shard) and (value.name, Replicate()) in self._cache

    def redistribute(self, value: Value, target: Replicate | Shard) -> Value:
        """The same tensor placed as `target`; each such change is made once."""
        if value.placement == target:
            return value
        key = (value.name, target)
        if key not in self._cache:
            self._cache[key] = self._move(value, target)
        return self._cache[key]

    @property
    def moved(self) -> list[tuple[str, Value]]:
        """The name of each value whose placement was changed, with what it has become."""
        return [(name, value) for (name, _), value in self._cache.items()]

    def _move(self, value: Value, target: Replicate | Shard) -> Value:
        if isinstance(value.placement, Partial):
            kind = value.placement.op
            if not operators.can_reduce(kind, value.dtype):
                raise Unplaceable(f"ranks can't form the {kind} of {dtype_name(value.dtype)} tensors")
            whole = self._collective("all_reduce", value, kind)
        elif isinstance(value.placement, Shard):
            whole = self._gather(value, value.placement)
        else:
            assert isinstance(target, Shard)
            return self._slice(value, target)
        return self.redistribute(whole, target)

    def _collective(self, kind: str, value: Value, *args: Any) -> Value:
        return self.call(
            f"collective.{kind}", (value, *args), {}, value.shape, value.dtype, Replicate(), f"{value.name}_{kind}"
        )

    def _gather(self, value: Value, placement: Shard) -> Value:
        local = self.local_shape(value.shape, placement)
        dim, blocks = placement.dim, placement.blocks
        stacked = (local[0] * self.size, *local[1:])
        gathered = self.call(
            "collective.all_gather", (value,), {}, stacked, value.dtype, Replicate(), f"{value.name}_all_gather"
        )
        if dim == 0 and blocks == 1:
            return replace(gathered, shape=value.shape)
        if isinstance(blocks, tuple):
            return self._joined(value, self.reshape(gathered, (self.size, *local)), dim, blocks)
        # [size, ..., blocks, part, ...] → [..., blocks, size, part, ...]
        part = divide(local[dim], blocks)
        if part is None:
            raise self.unplaceable(value.shape, placement)
        apart = (self.size, *local[:dim], blocks, part, *local[dim + 1 :])
        order = [*range(1, dim + 2), 0, *range(dim + 2, len(apart))]
        split = self.reshape(gathered, apart)
        moved = self.call(
            "aten.permute.default", (split, order), {}, [apart[axis] for axis in order], value.dtype, Replicate()
        )
        return self.reshape(moved, value.shape)

    def _joined(self, value: Value, gathered: Value, dim: int, blocks: Sequence[int]) -> Value:
        """`value` whole, of its ranks' parts [size, ...] in blocks of these sizes."""
        parts: list[Value] = []
        start = 0
        for block in blocks:
            own = self._narrow(gathered, dim + 1, start, block // self.size)
            order = [*range(1, dim + 1), 0, *range(dim + 1, own.ndim)]
            shape = [own.shape[axis] for axis in order]
            moved = self.call("aten.permute.default", (own, order), {}, shape, value.dtype, Replicate())
            parts.append(self.reshape(moved, (*value.shape[:dim], block, *value.shape[dim + 1 :])))
            start += block // self.size
        return self.call("aten.cat.default", (parts, dim), {}, value.shape, value.dtype, Replicate())

    def _narrow(self, value: Value, dim: int, start: int, length: int) -> Value:
        shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
        return self.call("aten.slice.Tensor", (value, dim, start, start + length), {}, shape, value.dtype, Replicate())

    def _slice(self, value: Value, target: Shard) -> Value:
        size, dim = value.shape[target.dim], target.dim
        if isinstance(target.blocks, tuple):
            self.local_shape(value.shape, target)
            starts = [sum(target.blocks[:index]) for index in range(len(target.blocks))]
            lengths = [block // self.size for block in target.blocks]
            parts = [
                self._narrow(value, dim, start + length * self.coordinate, length)
                for start, length in zip(starts, lengths, strict=True)
            ]
            return self.call("aten.cat.default", (parts, dim), {}, value.shape, value.dtype, target)
        part = divide(size, self.size * target.blocks)
        if part is None:
            raise self.unplaceable(value.shape, target)
        if target.blocks == 1:
            start = part * self.coordinate
            return self.call(
                "aten.slice.Tensor", (value, dim, start, start + part), {}, value.shape, value.dtype, target
            )
        apart = (*value.shape[:dim], target.blocks, self.size, part, *value.shape[dim + 1 :])
        split = self.reshape(value, apart)
        shape = (*apart[: dim + 1], *apart[dim + 2 :])
        own = self.call("aten.select.int", (split, dim + 1, self.coordinate), {}, shape, value.dtype, Replicate())
        merged = self.reshape(own, self.local_shape(value.shape, target))
        return Value(merged.name, value.shape, value.dtype, target)

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """A whole (or local, seen as whole) value in another shape."""
        return self.call("aten.reshape.default", (value, list(shape)), {}, shape, value.dtype, Replicate())

    def _append(
        self,
        name: str,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shape: tuple[Dim, ...] | None,
        dtype: torch.dtype | None,
        beside: tuple[str, ...] = (),
    ) -> LocalNode:
        try:
            node = LocalNode(
                self.unique(name),
                op,
                tuple(self._argument(value) for value in args),
                {key: self._argument(value) for key, value in kwargs.items()},
                shape,
                dtype,
                self.stage,
                False,
                beside,
            )
        except ExportError as error:
            raise ExportError(f"{op} ('{name}'): {error}") from error
        node = replace(node, from_data=any(self.from_data[source] for source in node.sources))
        self.from_data[node.name] = node.from_data
        if op.startswith("collective.") or not self.together.isdisjoint(node.sources):
            self.together.add(node.name)
        self.nodes.append(node)
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (Value, Scalar)):
            return Ref(value.name)
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        if isinstance(value, sympy.Basic):
            return int(value) if isinstance(value, sympy.Integer) else Size(self.printer.expression(value))
        if isinstance(value, torch.device):
            return Device()
        return value


Rule = Callable[["Emitter", "Call"], "Value | list[Value] | None"]
"""Emits one operator; None where the inputs' placements are none that it knows."""


@dataclass(frozen=True)
class Call:
    """An operator of the model's graph: its arguments by name, and its results' whole shapes and dtypes. `shared`:
    whether several others take the result.
    """

    name: str
    op: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    results: tuple[tuple[tuple[Dim, ...], torch.dtype], ...]
    several: bool
    shared: bool = False

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.results[0][0]

    @property
    def dtype(self) -> torch.dtype:
        return self.results[0][1]

    @property
    def opname(self) -> str:
        packet: str = self.op._opname
        return packet

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str) -> Any:
        return self.arguments.get(argument)

    @property
    def values(self) -> dict[str, Value]:
        """The arguments that are tensors; those of a list as name[0], name[1], …"""
        found: dict[str, Value] = {}
        for key, value in self.arguments.items():
            if isinstance(value, Value):
                found[key] = value
            elif isinstance(value, (list, tuple)):
                found.update({f"{key}[{i}]": item for i, item in enumerate(value) if isinstance(item, Value)})
        return found

    def mapped(self, change: Callable[[Value], Value]) -> Call:
        """The same call with each tensor changed."""

        def walk(value: Any) -> Any:
            if isinstance(value, Value):
                return change(value)
            return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

        return replace(self, arguments={key: walk(value) for key, value in self.arguments.items()})

    def emit(
        self, emitter: Emitter, placement: Placement, beside: Sequence[Value] = (), /, **changed: Any
    ) -> Value | list[Value]:
        """Append this call, with some arguments changed, all results placed alike; `beside`: what other ranks take."""
        arguments = {**self.arguments, **changed}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        skipped = False
        for argument in self.op._schema.arguments:
            if argument.name not in arguments or (
                argument.has_default_value() and _same(arguments[argument.name], argument.default_value)
            ):
                skipped = True
            elif argument.kwarg_only or skipped:
                kwargs[argument.name] = arguments[argument.name]
            else:
                args.append(arguments[argument.name])
        op = f"aten.{self.opname}.{self.op._overloadname}"
        if self.several:
            return emitter.call_many(op, args, kwargs, self.results, [placement] * len(self.results), self.name)
        return emitter.call(op, args, kwargs, self.shape, self.dtype, placement, self.name, beside)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, (Value, list, tuple)) and bool(value == default)


def describe(value: Value) -> str:
    """For messages: float32 [b, 64] Shard(1)."""
    return f"{dtype_name(value.dtype)} {list(value.shape)} {value.placement}"
