"""`export`: from a plain module to the folders of all local ranks."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import cut, write
from shardserve.export.placements import Replicate, Shard
from shardserve.export.plan import Plan
from shardserve.export.propagate import LocalGraph, propagate
from shardserve.export.report import Report, StageReport
from shardserve.export.trace import Trace, ordered, trace
from shardserve.shards.config import Signature, TensorSpec
from shardserve.shards.graph import dtype_name

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


def export(
    model: nn.Module,
    args: Sequence[Any],
    *,
    name: str,
    out: str | Path,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    plan: Plan | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    cuts: Sequence[str] = (),
    strict: bool = False,
) -> Report:
    """Cut `model` into tensor_parallel x pipeline_parallel shards and write out/device0 … in this one process.

    `args` and `kwargs` are example inputs, `dynamic_shapes` is what torch.export takes; inputs and outputs are named
    after forward's parameters and results unless names are given. `cuts` (or the plan's) name the module that begins
    each later stage; without them, stages are balanced by their parameters' bytes. `strict` refuses a
    tensor-parallel export whose plan shards no parameter. Raises ExportError.
    """
    started = time.perf_counter()
    _check(name, tensor_parallel, pipeline_parallel, plan)
    plan = plan or Plan()
    kwargs = ordered(model, kwargs or {})
    traced = trace(model, args, kwargs, dynamic_shapes, input_names, output_names)
    trace_seconds = time.perf_counter() - started
    shapes = {tensor: tuple(value.shape) for tensor, value in traced.tensors.items()}
    shapes = {tensor: tuple(value.shape) for tensor, value in traced.tensors.items()}
    placements = _placements(model, plan, shapes, tensor_parallel)
    if strict and _only_replicated(placements, tensor_parallel):
        raise ExportError(f"the plan shards no parameter: {tensor_parallel} ranks would compute the same")
    cuts = _cuts(traced, tuple(cuts) or tuple(plan.cuts), pipeline_parallel)
    stages = cut.assign(traced, cuts)
    graphs = [propagate(traced, placements, stages, tensor_parallel, rank) for rank in range(tensor_parallel)]
    signature = _signature(traced, graphs[0])
    reports = _write(Path(out), name, traced, graphs, placements, signature, pipeline_parallel)
    return Report(
        name,
        Path(out),
        reports[0],
        tensor_parallel * pipeline_parallel,
        pipeline_parallel,
        signature,
        tuple(cuts),
        reports[1],
        dict(graphs[0].gathered),
        _warnings(graphs[0], placements, tensor_parallel),
        trace_seconds,
        time.perf_counter() - started,
    )


def _check(name: str, tensor_parallel: int, pipeline_parallel: int, plan: Plan | None) -> None:
    if not _NAME.match(name):
        raise ExportError(f"name '{name}' must be letters, digits, '_', '-' and '.', to name a file")
    for what, count in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if count < 1:
            raise ExportError(f"{what} must be at least 1, got {count}")
    if tensor_parallel > 1 and plan is None:
        raise ExportError("tensor_parallel > 1 needs a plan: finding one automatically is not supported yet")


def _placements(
    model: nn.Module, plan: Plan, traced: Mapping[str, tuple[int, ...]], size: int
) -> dict[str, Replicate | Shard]:
    """The placement of every tensor. Tied weights have several names and one placement, given by any of them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    given = plan.placements({**{name: tuple(value.shape) for name, value in named.items()}, **traced}, size)
    by_tensor: dict[int, tuple[str, Replicate | Shard]] = {}
    for name, placement in given.items():
        if name in named:
            first, decided = by_tensor.setdefault(id(named[name]), (name, placement))
            if decided != placement:
                raise ExportError(f"plan: '{first}' and '{name}' are one tied weight, given {decided} and {placement}")
    placements: dict[str, Replicate | Shard] = {name: given.get(name, Replicate()) for name in traced}
    for name, value in named.items():
        if name in traced and id(value) in by_tensor:
            placements[name] = by_tensor[id(value)][1]
    return placements


def _cuts(traced: Trace, cuts: tuple[str, ...], stages: int) -> tuple[str, ...]:
    if not cuts and stages > 1:
        return cut.balance(traced, stages)
    if len(cuts) != stages - 1:
        raise ExportError(f"{stages} pipeline stages need {stages - 1} cuts, got {len(cuts)}: {', '.join(cuts)}")
    return cuts


def _signature(traced: Trace, graph: LocalGraph) -> Signature:
    def specs(names: Sequence[str], values: Sequence[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, dtype_name(value.dtype), traced.printer.shape(value.shape))
            for name, value in zip(names, values, strict=True)
        )

    try:
        return Signature(
            dict(traced.dims),
            specs([name for name, _ in traced.inputs], graph.inputs),
            specs([name for name, _ in traced.outputs], graph.outputs),
            traced.conditions,
        )
    except ValueError as error:
        raise ExportError(f"the model's inputs or outputs can't be served: {error}") from error


def _write(
    out: Path,
    name: str,
    traced: Trace,
    graphs: Sequence[LocalGraph],
    placements: Mapping[str, Replicate | Shard],
    signature: Signature,
    stage_size: int,
) -> tuple[str, tuple[StageReport, ...]]:
    size = len(graphs)
    export_id = uuid.uuid4().hex
    stages = [cut.split(graph, stage_size) for graph in graphs]
    meanings = [write.meanings(graph) for graph in graphs]
    stored = _stored_names(traced.tensors)
    reports: list[StageReport] = []
    writer = write.Writer(out, name)
    try:
        for stage in range(stage_size):
            files = [
                write.graph_file(stages[rank][stage], meanings[rank], signature, traced.printer, export_id, stored)
                for rank in range(size)
            ]
            specs = [
                (
                    signature.inputs
                    if stage == 0
                    else write.crossing_specs(stages[rank][stage].receives, meanings[rank], traced.printer),
                    signature.outputs
                    if stage == stage_size - 1
                    else write.crossing_specs(stages[rank][stage].sends, meanings[rank], traced.printer),
                )
                for rank in range(size)
            ]
            sequence = write.collectives(files[0])
            for rank in range(size):
                # Rule: every rank of a group issues the same collectives, or the group deadlocks or mixes data up.
                if write.collectives(files[rank]) != sequence or specs[rank] != specs[0]:
                    raise ExportError(
                        f"ranks 0 and {rank} of stage {stage} differ in their collectives: a bug, report it"
                    )
            weights_bytes: list[int] = []
            for rank in range(size):
                config = write.empty_config(
                    name, export_id, signature, stage * size + rank, size * stage_size, stage_size, *specs[rank]
                )
                weights = {
                    stored[bound.tensor]: write.part(traced.tensors[bound.tensor], bound.placement, size, rank)
                    for bound in stages[rank][stage].parameters
                }
                weights_bytes.append(writer.write(config, files[rank], weights).parameter_bytes)
            kinds = tuple(node.op.partition(".")[2] for node in files[0].nodes if node.op.startswith("collective."))
            reports.append(StageReport(kinds, specs[0][1], tuple(weights_bytes)))
        writer.commit()
    finally:
        writer.discard()
    return export_id, tuple(reports)


def _stored_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the model → name in the weights file: tied weights are stored once."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        stored[name] = first.setdefault(key, name)
    return stored


def _warnings(graph: LocalGraph, placements: Mapping[str, Replicate | Shard], size: int) -> tuple[str, ...]:
    found = [
        f"{op} takes whole tensors: sharded inputs are gathered for it ({count} time{'s' * (count > 1)})"
        for op, count in graph.gathered.items()
    ]
    if _only_replicated(placements, size):
        found.append(f"no parameter is sharded: each of the {size} ranks of a stage computes the same")
    return tuple(found)


def _only_replicated(placements: Mapping[str, Replicate | Shard], size: int) -> bool:
    return size > 1 and all(isinstance(placement, Replicate) for placement in placements.values())
