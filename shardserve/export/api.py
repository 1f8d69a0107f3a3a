"""`export` and `export_subgraphs`: from a plain module to the folders of all local ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from shardserve.errors import ExportError
from shardserve.export import balance, cut, planning
from shardserve.export.assemble import RankShard, assemble, with_all_weights
from shardserve.export.placements import Replicate, Shard
from shardserve.export.plan import Plan
from shardserve.export.propagate import LocalGraph, propagate
from shardserve.export.report import Report, StageReport
from shardserve.export.sources import Checkpoint, Filled, Weights, fill, has_meta, load_checkpoint
from shardserve.export.state import settle
from shardserve.export.subgraphs import Subgraph, calling, with_own_constants
from shardserve.export.trace import Trace, ordered, trace
from shardserve.export.write import Writer, Written, folder_of
from shardserve.progress import Progress, quietly
from shardserve.shards.config import FILE_NAME, Signature, TensorSpec
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
    whole = Subgraph(args, kwargs or {}, dynamic_shapes, input_names, output_names)
    shape = tensor_parallel, pipeline_parallel
    folders = {name: Path(out)}
    return _export(model, name, {name: whole}, folders, shape, plan, weights, program, cuts, strict, progress)[name]


def export_subgraphs(
    model: nn.Module,
    subgraphs: Mapping[str, Subgraph],
    *,
    name: str,
    out: str | Path,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    plan: Plan | None = None,
    weights: Weights | Checkpoint | None = None,
    cuts: Sequence[str] = (),
    strict: bool = False,
    progress: Progress = quietly,
) -> dict[str, Report]:
    """Cut several ways to call one model alike, and write each to out/SUBGRAPH/device0 …

    A rank that is given all of them has one copy of the weights (their files are one, where the file system has hard
    links) and of each buffer that one of them changes. Everything else is as for `export`.
    """
    if not subgraphs:
        raise ExportError("no subgraph is given")
    for subgraph in subgraphs:
        if not FILE_NAME.match(subgraph):
            raise ExportError(f"subgraph '{subgraph}' must be letters, digits, '_', '-' and '.', to name a folder")
    folders = {subgraph: Path(out) / subgraph for subgraph in subgraphs}
    shape = tensor_parallel, pipeline_parallel
    return _export(model, name, subgraphs, folders, shape, plan, weights, None, cuts, strict, progress)


def _export(
    model: nn.Module,
    name: str,
    subgraphs: Mapping[str, Subgraph],
    folders: Mapping[str, Path],
    shape: tuple[int, int],
    plan: Plan | None,
    weights: Weights | Checkpoint | None,
    program: ExportedProgram | None,
    cuts: Sequence[str],
    strict: bool,
    progress: Progress,
) -> dict[str, Report]:
    """shape: tensor-parallel ranks, pipeline stages. The rest is as for `export_subgraphs`."""
    started = time.perf_counter()
    size, count = shape
    _check(name, size, count)
    # Before the tracing, which takes its time.
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(folder_of(folder))
        plan = plan or Plan(auto=True)
        filled = _filled(model, weights)
        traces = _traced(model, subgraphs, program, progress)
        filled.check([tensor for traced in traces.values() for node, tensor in traced.bound.items() if node.users])
        trace_seconds = time.perf_counter() - started
        placements: dict[str, Replicate | Shard] = {}
        plans: dict[str, tuple[Plan, tuple[str, ...] | None]] = {}
        for subgraph, traced in traces.items():
            found, complete, whole = _planned(model, plan, traced, size, placements, progress)
            plans[subgraph] = complete, whole
            placements |= found
        if strict and _only_replicated(placements, size):
            raise ExportError(f"the plan shards no parameter: {size} ranks would compute the same")
        first = next(iter(traces.values()))
        cuts = _cuts(first, tuple(cuts) or (tuple(plan.cuts) if count > 1 else ()), count)
        stages = {subgraph: cut.assign(traced, cuts) for subgraph, traced in traces.items()}
        kept = settle(list(traces.values()), placements, list(stages.values()), size)
        graphs: dict[str, list[LocalGraph]] = {subgraph: [] for subgraph in traces}
        for rank in range(size):
            progress("cutting the graph", rank, size)
            for subgraph, traced in traces.items():
                graphs[subgraph].append(propagate(traced, placements, stages[subgraph], size, rank, kept))
        shards = {
            subgraph: assemble(name, traced, graphs[subgraph], _signature(traced, graphs[subgraph][0]), count)
            for subgraph, traced in traces.items()
        }
        reports = _write(folders, name, with_all_weights(shards), traces, progress)
        return {
            subgraph: Report(
                name,
                folders[subgraph],
                shards[subgraph][0][0].config.export_id,
                size * count,
                count,
                shards[subgraph][0][0].config.signature,
                tuple(cuts),
                reports[subgraph],
                dict(graphs[subgraph][0].gathered),
                (*filled.warnings, *_warnings(graphs[subgraph][0], placements, size)),
                trace_seconds,
                time.perf_counter() - started,
                *plans[subgraph],
            )
            for subgraph in traces
        }


def _traced(
    model: nn.Module, subgraphs: Mapping[str, Subgraph], program: ExportedProgram | None, progress: Progress
) -> dict[str, Trace]:
    traces: dict[str, Trace] = {}
    for number, (name, subgraph) in enumerate(subgraphs.items()):
        progress("tracing the model", number, len(subgraphs))
        with calling(model, subgraph.method):
            kwargs = ordered(model, subgraph.kwargs)
            names = subgraph.input_names, subgraph.output_names
            traces[name] = trace(model, subgraph.args, kwargs, subgraph.dynamic_shapes, *names, program)
    return with_own_constants(model, traces) if len(traces) > 1 else traces


def _check(name: str, tensor_parallel: int, pipeline_parallel: int) -> None:
    if not FILE_NAME.match(name):
        raise ExportError(f"name '{name}' must be letters, digits, '_', '-' and '.', to name a file")
    for what, count in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if count < 1:
            raise ExportError(f"{what} must be at least 1, got {count}")


def _planned(
    model: nn.Module,
    plan: Plan,
    traced: Trace,
    size: int,
    decided: Mapping[str, Replicate | Shard],
    progress: Progress,
) -> tuple[dict[str, Replicate | Shard], Plan, tuple[str, ...] | None]:
    """The placement of every tensor, the plan that says so, and, of one that was found, what stays whole and why.

    `decided`: placements of tensors that another subgraph has, too.
    """
    shapes = {tensor: tuple(value.shape) for tensor, value in traced.tensors.items()}
    given = {name: placement for name, placement in decided.items() if name in shapes}
    given |= _placements(model, plan, shapes, size)
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
    folders: Mapping[str, Path],
    name: str,
    shards: Mapping[str, Sequence[Sequence[RankShard]]],
    traces: Mapping[str, Trace],
    progress: Progress,
) -> dict[str, tuple[StageReport, ...]]:
    """The weights of a rank are written with the first subgraph, and linked to by the others."""
    reports: dict[str, tuple[StageReport, ...]] = {}
    tensors = {tensor: value for traced in traces.values() for tensor, value in traced.tensors.items()}
    count = sum(len(ranks) for stages in shards.values() for ranks in stages)
    with ExitStack() as stack:
        writers = {subgraph: Writer(folder, name) for subgraph, folder in folders.items()}
        for writer in writers.values():
            stack.callback(writer.discard)
        first: dict[int, Written] = {}
        done = 0
        for subgraph, stages in shards.items():
            found: list[StageReport] = []
            for ranks in stages:
                sizes: list[int] = []
                for shard in ranks:
                    progress("writing shards", done, count)
                    done, rank = done + 1, shard.config.rank
                    values = partial(shard.part, tensors=tensors)
                    written = writers[subgraph].write(shard.config, shard.graph, shard.layout, values, first.get(rank))
                    first.setdefault(rank, written)
                    sizes.append(written.config.parameter_bytes)
                config = ranks[0].config
                found.append(StageReport(ranks[0].collectives, config.sends, tuple(sizes), config.state))
            reports[subgraph] = tuple(found)
        progress("writing shards", count, count)
        for writer in writers.values():
            writer.commit()
    return reports


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
