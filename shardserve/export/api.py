"""`export`: from a plain module to the folders of all local ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from shardserve.errors import ExportError
from shardserve.export import balance, cut, planning
from shardserve.export.assemble import RankShard, assemble
from shardserve.export.placements import Replicate, Shard
from shardserve.export.plan import Plan
from shardserve.export.propagate import LocalGraph, propagate
from shardserve.export.report import Report, StageReport
from shardserve.export.sources import Checkpoint, Filled, Weights, fill, has_meta, load_checkpoint
from shardserve.export.state import settle
from shardserve.export.trace import Trace, ordered, trace
from shardserve.export.write import Writer, folder_of
from shardserve.progress import Progress, quietly
from shardserve.shards.config import FILE_NAME, ShardConfig, Signature, TensorSpec
from shardserve.shards.graph import dtype_name

_CUTTING = frozenset({"split", "chunk", "split_with_sizes"})


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
    weights: Weights | Checkpoint | None = None,
    program: ExportedProgram | None = None,
    cuts: Sequence[str] = (),
    strict: bool = False,
    progress: Progress = quietly,
) -> Report:
    """Cut `model` into tensor_parallel x pipeline_parallel shards and write out/device0 … in this one process.

    `args` and `kwargs` are example inputs, `dynamic_shapes` is what torch.export takes; inputs and outputs are named
    after forward's parameters and results unless names are given. `weights` (safetensors files, a folder of them, or a
    state dict) gives parameters and persistent buffers their values: `model` gets them in place, as views of the files,
    so it may have been made under `without_storage`. `program` is `model`, exported already. `cuts` (or the plan's)
    name the module that begins each later stage; without them, stages are balanced by their cost. Without a plan, one
    is found automatically; the report has it. `strict` refuses a plan that shards no parameter, if tensor_parallel is
    more than 1. `progress` hears of what is traced, cut and written. Raises ExportError.
    """
    started = time.perf_counter()
    _check(name, tensor_parallel, pipeline_parallel)
    # Before the tracing, which takes its time.
    with folder_of(Path(out)):
        plan = plan or Plan(auto=True)
        kwargs = ordered(model, kwargs or {})
        filled = _filled(model, weights)
        progress("tracing the model", 0, 1)
        traced = trace(model, args, kwargs, dynamic_shapes, input_names, output_names, program)
        filled.check([tensor for node, tensor in traced.bound.items() if node.users])
        trace_seconds = time.perf_counter() - started
        placements, plan, whole = _planned(model, plan, traced, tensor_parallel, progress)
        if strict and _only_replicated(placements, tensor_parallel):
            raise ExportError(f"the plan shards no parameter: {tensor_parallel} ranks would compute the same")
        cuts = _cuts(traced, tuple(cuts) or (tuple(plan.cuts) if pipeline_parallel > 1 else ()), pipeline_parallel)
        stages = cut.assign(traced, cuts)
        kept = settle([traced], placements, [stages], tensor_parallel)
        graphs: list[LocalGraph] = []
        for rank in range(tensor_parallel):
            progress("cutting the graph", rank, tensor_parallel)
            graphs.append(propagate(traced, placements, stages, tensor_parallel, rank, kept))
        signature = _signature(traced, graphs[0])
        shards = assemble(name, traced, graphs, signature, pipeline_parallel)
        reports = _write(Path(out), name, traced, shards, progress)
        return Report(
            name,
            Path(out),
            shards[0][0].config.export_id,
            tensor_parallel * pipeline_parallel,
            pipeline_parallel,
            signature,
            tuple(cuts),
            reports,
            dict(graphs[0].gathered),
            (*filled.warnings, *_warnings(graphs[0], placements, tensor_parallel)),
            trace_seconds,
            time.perf_counter() - started,
            plan,
            whole,
        )


def _check(name: str, tensor_parallel: int, pipeline_parallel: int) -> None:
    if not FILE_NAME.match(name):
        raise ExportError(f"name '{name}' must be letters, digits, '_', '-' and '.', to name a file")
    for what, count in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if count < 1:
            raise ExportError(f"{what} must be at least 1, got {count}")


def _planned(
    model: nn.Module, plan: Plan, traced: Trace, size: int, progress: Progress
) -> tuple[dict[str, Replicate | Shard], Plan, tuple[str, ...] | None]:
    """The placement of every tensor, the plan that says so, and, of one that was found, what stays whole and why."""
    shapes = {tensor: tuple(value.shape) for tensor, value in traced.tensors.items()}
    given = _placements(model, plan, shapes, size)
    placements: dict[str, Replicate | Shard] = dict.fromkeys(shapes, Replicate())
    if size == 1 or not plan.auto:
        return placements | given, plan, None
    progress("finding a plan", 0, 1)
    found = planning.find(traced, size, given)
    placements = {**placements, **found.placements, **given}
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(value): name for name, value in named.items() if name in shapes}
    names = {name: first[id(value)] for name, value in named.items() if id(value) in first}
    names |= {name: name for name in shapes}
    complete = Plan(planning.patterns(traced, placements, names), plan.cuts)
    return placements, complete, found.replicated


def _filled(model: nn.Module, weights: Weights | Checkpoint | None) -> Filled:
    """`model` with the values of `weights`; nothing to do where it has its own."""
    if weights is None:
        return fill(model, None) if has_meta(model) else Filled()
    return fill(model, weights if isinstance(weights, Checkpoint) else load_checkpoint(weights))


def _placements(
    model: nn.Module, plan: Plan, traced: Mapping[str, tuple[int, ...]], size: int
) -> dict[str, Replicate | Shard]:
    """The given placements. Tied weights have several names and one placement, given by any of them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    given = plan.placements({**{name: tuple(value.shape) for name, value in named.items()}, **traced}, size)
    by_tensor: dict[int, tuple[str, Replicate | Shard]] = {}
    for name, placement in given.items():
        if name in named:
            first, decided = by_tensor.setdefault(id(named[name]), (name, placement))
            if decided != placement:
                raise ExportError(f"plan: '{first}' and '{name}' are one tied weight, given {decided} and {placement}")
    placements = {name: placement for name, placement in given.items() if name in traced}
    for name, value in named.items():
        if name in traced and id(value) in by_tensor:
            placements[name] = by_tensor[id(value)][1]
    return placements


def _cuts(traced: Trace, cuts: tuple[str, ...], stages: int) -> tuple[str, ...]:
    if not cuts and stages > 1:
        return balance.balance(traced, stages)
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
    out: Path, name: str, traced: Trace, shards: Sequence[Sequence[RankShard]], progress: Progress
) -> tuple[StageReport, ...]:
    reports: list[StageReport] = []
    count = sum(map(len, shards))
    writer = Writer(out, name)
    try:
        for ranks in shards:
            written: list[ShardConfig] = []
            for shard in ranks:
                progress("writing shards", shard.config.rank, count)
                values = partial(shard.part, tensors=traced.tensors)
                written.append(writer.write(shard.config, shard.graph, shard.layout, values))
            sizes = tuple(config.parameter_bytes for config in written)
            config = ranks[0].config
            reports.append(StageReport(ranks[0].collectives, config.sends, sizes, config.state))
        progress("writing shards", count, count)
        writer.commit()
    finally:
        writer.discard()
    return tuple(reports)


def _warnings(graph: LocalGraph, placements: Mapping[str, Replicate | Shard], size: int) -> tuple[str, ...]:
    found = [
        f"{op} takes whole tensors: sharded inputs are gathered for it ({count} time{'s' * (count > 1)})"
        + ("; if it cuts a fused projection in N, shard that as Shard(dim, blocks=N)" if op in _CUTTING else "")
        for op, count in graph.gathered.items()
    ]
    if _only_replicated(placements, size):
        found.append(f"no parameter is sharded: each of the {size} ranks of a stage computes the same")
    return tuple(found)


def _only_replicated(placements: Mapping[str, Replicate | Shard], size: int) -> bool:
    return size > 1 and all(isinstance(placement, Replicate) for placement in placements.values())
