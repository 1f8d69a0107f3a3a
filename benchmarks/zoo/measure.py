"""One model in one layout: exported, run from its files at several sizes, compared, counted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.zoo.registry import Case
from shardserve.errors import ShardserveError
from shardserve.export import export, verify
from shardserve.export.flops import flops
from shardserve.export.threads import ThreadCollective, ThreadGroup
from shardserve.export.verify import Shards
from shardserve.shards.graph import GraphFile, dtype_name
from shardserve.shards.program import Program

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2pp2": (2, 2), "tp4": (4, 1)}
"""Tensor-parallel ranks x pipeline stages."""

MOST_BYTES = 1.15
MOST_FLOPS = 1.2


@dataclass(frozen=True)
class Row:
    """error: the largest, in terms of the outputs' scale, over `sizes` sizes of the dynamic dims. weights and flops:
    the sum over all ranks / what the whole model has, so 1 is the ideal; *_largest: the same if all ranks were as the
    one that has the most. replicated: the part of the whole model's bytes that all tensor-parallel ranks hold, and why.
    hand: what the hand-written plan issues of collectives.
    """

    model: str
    layout: str
    failure: str | None = None
    error: float | None = None
    matches: bool = False
    sizes: int = 0
    collectives: Mapping[str, int] | None = None
    hand: int | None = None
    weights: float | None = None
    weights_largest: float | None = None
    flops: float | None = None
    flops_largest: float | None = None
    replicated: float | None = None
    why: str = ""
    trace_seconds: float | None = None
    missed: tuple[str, ...] = ()

    @property
    def exported(self) -> bool:
        return self.failure is None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exported": self.exported}


@dataclass(frozen=True)
class Whole:
    """The unsharded model: bytes of weights, FLOPs of a step on the example inputs, the outputs' scale."""

    weights: int
    flops: int
    scale: float


class Counting(fx.Interpreter):
    """Runs a shard's graph operator by operator and adds up the FLOPs of those that multiply matrices."""

    def __init__(self, program: Program, collective: ThreadCollective) -> None:
        super().__init__(fx.GraphModule(nn.Module(), program.graph))
        self.program, self.collective, self.flops = program, collective, 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self.program.issued.get(target)
        if node is not None:
            kind = node.op.partition(".")[2]
            issue: Callable[..., Tensor] = getattr(self.collective, kind)
            return issue(args[0].contiguous(), *node.args[1:])
        result = super().call_function(target, args, kwargs)
        if isinstance(target, torch._ops.OpOverload):
            tensors = [tuple(leaf.shape) for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            first = next((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), None)
            if first is not None:
                equation = args[0] if isinstance(args[0], str) else ""
                self.flops += int(flops(target._opname, tensors, tuple(first.shape), equation))
        return result


def count(shards: Shards, inputs: Mapping[str, Tensor]) -> list[int]:
    """The FLOPs of a step on each rank, in order."""
    signature = shards.signature
    dims = signature.bind(
        {name: tuple(tensor.shape) for name, tensor in inputs.items()},
        {name: dtype_name(tensor.dtype) for name, tensor in inputs.items()},
    )
    carried = [[inputs[spec.name] for spec in signature.inputs] for _ in shards.stages[0]]
    counted: list[int] = []
    for stage in shards.stages:

        def work(
            stage: Sequence[Program], carried: Sequence[Sequence[Tensor]], collective: ThreadCollective
        ) -> tuple[list[Tensor], int]:
            program = stage[collective.rank]
            counting = Counting(program, collective)
            sizes = [dims[dim] for dim in program.dims]
            sent = counting.run(*sizes, *carried[collective.rank], *program.parameters)
            return list(sent), counting.flops

        results = ThreadGroup(len(stage)).run(partial(work, stage, carried))
        carried = [sent for sent, _ in results]
        counted += [number for _, number in results]
    return counted


def leaves(case: Case, shards: Shards) -> dict[str, Tensor]:
    """The example's tensors by the names of the inputs."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(case.kwargs)) if isinstance(leaf, Tensor)]
    return {spec.name: tensor for spec, tensor in zip(shards.signature.inputs, tensors, strict=True)}


def whole(case: Case, folder: Path) -> Whole:
    """Exports the model for a single rank, which is the whole."""
    export(case.model, (), name="zoo", out=folder, kwargs=case.kwargs, dynamic_shapes=dict(case.dynamic_shapes))
    shards = Shards(folder, "zoo")
    inputs = leaves(case, shards)
    outputs = [output.double() for output in shards.run(inputs) if output.is_floating_point()]
    scale = min(float(output[output.isfinite()].abs().max()) for output in outputs)
    return Whole(shards.stages[0][0].config.parameter_bytes, count(shards, inputs)[0], scale)


def measure(name: str, case: Case, layout: str, base: Whole, folder: Path) -> Row:
    """Exports, verifies and counts; what goes wrong is in the row."""
    tensor_parallel, pipeline_parallel = LAYOUTS[layout]
    hand = case.collectives if tensor_parallel > 1 else 0
    try:
        report = export(
            case.model,
            (),
            name="zoo",
            out=folder,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            kwargs=case.kwargs,
            dynamic_shapes=dict(case.dynamic_shapes),
        )
        atol = case.tolerance * base.scale
        result = verify(case.model, (), case.kwargs, folder, "zoo", atol=atol, rtol=case.tolerance)
        shards = Shards(folder, "zoo")
        flops = count(shards, leaves(case, shards))
    except (
        ShardserveError,
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return Row(name, layout, failure=f"{type(error).__name__}: {error}", hand=hand, missed=("not exported",))
    programs = [program for stage in shards.stages for program in stage]
    ranks = len(programs)
    held = [program.config.parameter_bytes for program in programs]
    collectives = dict(report.collectives())
    replicated = _replicated(shards, folder) / base.weights if tensor_parallel > 1 else 0.0
    row = Row(
        name,
        layout,
        None,
        result.max_abs_error / base.scale,
        result.passed,
        len(result.sizes),
        collectives,
        hand,
        sum(held) / base.weights,
        max(held) * ranks / base.weights,
        sum(flops) / base.flops if base.flops else None,
        max(flops) * ranks / base.flops if base.flops else None,
        replicated,
        "; ".join(report.replicated or ()),
        report.trace_seconds,
    )
    return Row(**{**row.__dict__, "missed": tuple(_missed(row, case, tensor_parallel))})


def _replicated(shards: Shards, folder: Path) -> int:
    """Bytes of weights that are the same on the ranks of a stage."""
    shared = 0
    for stage in shards.stages:
        held: list[dict[str, Tensor]] = []
        for program in stage[:2]:
            graph = GraphFile.load(folder / f"device{program.config.rank}" / program.config.graph_file)
            named = zip(graph.parameters, program.parameters, strict=True)
            held.append({parameter.tensor: tensor for parameter, tensor in named})
        for name, tensor in held[0].items():
            # What one rank alone has (a bias that is added once) isn't on the others, but isn't cut either.
            same = len(held) > 1 and (name not in held[1] or torch.equal(tensor, held[1][name]))
            shared += tensor.nbytes if same else 0
    return shared


def _missed(row: Row, case: Case, tensor_parallel: int) -> list[str]:
    missed = [] if row.matches else ["differs"]
    if tensor_parallel > 1:
        if row.replicated is not None and row.replicated > 0.99:
            missed.append("not sharded")
        if row.hand is not None and sum((row.collectives or {}).values()) > row.hand:
            missed.append("collectives")
        if case.bounded and (row.weights or 0) > MOST_BYTES:
            missed.append("bytes")
        if case.bounded and (row.flops or 0) > MOST_FLOPS:
            missed.append("FLOPs")
    return missed


def rows(name: str, case: Case, layouts: Sequence[str]) -> list[Row]:
    """All layouts of a model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            base = whole(case, Path(folder))
        except (
            ShardserveError,
            ArithmeticError,
            AssertionError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            failure = f"{type(error).__name__}: {error}"
            return [Row(name, layout, failure=failure, missed=("not exported",)) for layout in layouts]
        return [measure(name, case, layout, base, Path(folder)) for layout in layouts if allowed(case, layout)]


def allowed(case: Case, layout: str) -> bool:
    """Whether the model's heads divide for this layout."""
    return LAYOUTS[layout][0] in (1, *case.tensor_parallel)
