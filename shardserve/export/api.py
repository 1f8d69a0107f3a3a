"""`export` and `export_subgraphs`: from a plain module to the folders of all local ranks."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError
from shardserve.export import planning
from shardserve.export.cost import Sizes
from shardserve.export.layouts.choice import Wanted, choose
from shardserve.export.layouts.layout import Layout, Planner
from shardserve.export.planning.plan import Plan
from shardserve.export.report import Report, stage_reports
from shardserve.export.sharding.propagate import LocalGraph
from shardserve.export.sources import Checkpoint, Filled, Weights, fill, has_meta, hollow, load_checkpoint
from shardserve.export.sources.names import named
from shardserve.export.subgraphs import Subgraph, calling, with_own_constants
from shardserve.export.tracing.dtypes import check_products
from shardserve.export.tracing.trace import Trace, ordered, trace
from shardserve.export.verification.sizes import bind
from shardserve.export.writing.assemble import RankShard, assemble, with_all_weights
from shardserve.export.writing.write import Writer, Written, commit, folder_of
from shardserve.progress import Progress, quietly
from shardserve.shards.config import FILE_NAME, Signature, TensorSpec
from shardserve.shards.graph import dtype_name

logger = logging.getLogger(__name__)

_CUTTING = frozenset({"split", "chunk", "split_with_sizes"})
_NAMED = 6  # how many names a warning lists


def export(
    model: nn.Module,
    args: Sequence[Any],
    *,
    name: str,
    out: str | Path | None,
    tensor_parallel: int | None = 1,
    pipeline_parallel: int | None = 1,
    ranks: int | None = None,
    memory_per_device: int | None = None,
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
    inputs: Mapping[str, Tensor] | None = None,
) -> Report:
    """Cut `model` into tensor_parallel x pipeline_parallel shards and write out/device0 … in this one process.

    `out` None: plans and reports alone; nothing is written, and parameters need no values. `args` and `kwargs` are
    example inputs, `dynamic_shapes` is what torch.export takes; inputs and outputs are named after forward's parameters
    and results unless names are given. `weights` (safetensors files, a folder of them, or a state dict) gives
    parameters and persistent buffers their values: `model` gets them in place, as views of the files, so it may have
    been made under `without_storage`. `program` is `model`, exported already.

    With `ranks`, tensor_parallel and pipeline_parallel may be None: of the layouts of at most so many ranks the fastest
    by the cost model is taken whose ranks fit into `memory_per_device` bytes; the report has all. `cuts` (or the
    plan's) name the module that begins each later stage; without them, stages are balanced by their cost. Without a
    plan, one is found automatically; the report has it. `strict` refuses a plan that shards no parameter, if
    tensor_parallel is more than 1. `progress` hears of what is traced, cut and written. `inputs`, which `verify` is to
    be given, are looked at before anything is written: InvalidInput if the model doesn't take their names, dtypes and
    shapes. Raises ExportError.
    """
    whole = Subgraph(args, kwargs or {}, dynamic_shapes, input_names, output_names)
    wanted = Wanted(tensor_parallel, pipeline_parallel, ranks, memory_per_device)
    folders = {name: Path(out)} if out is not None else None
    found = _export(
        model,
        name,
        {name: whole},
        folders,
        wanted,
        plan=plan,
        weights=weights,
        program=program,
        cuts=cuts,
        strict=strict,
        progress=progress,
        inputs=inputs,
    )
    return found[name]


def export_subgraphs(
    model: nn.Module,
    subgraphs: Mapping[str, Subgraph],
    *,
    name: str,
    out: str | Path | None,
    tensor_parallel: int | None = 1,
    pipeline_parallel: int | None = 1,
    ranks: int | None = None,
    memory_per_device: int | None = None,
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
    folders = {subgraph: Path(out) / subgraph for subgraph in subgraphs} if out is not None else None
    wanted = Wanted(tensor_parallel, pipeline_parallel, ranks, memory_per_device)
    return _export(
        model, name, subgraphs, folders, wanted, plan=plan, weights=weights, cuts=cuts, strict=strict, progress=progress
    )


def _export(
    model: nn.Module,
    name: str,
    subgraphs: Mapping[str, Subgraph],
    folders: Mapping[str, Path] | None,
    wanted: Wanted,
    *,
    plan: Plan | None,
    weights: Weights | Checkpoint | None,
    cuts: Sequence[str],
    strict: bool,
    progress: Progress,
    program: ExportedProgram | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Report]:
    """folders: where each subgraph is written; None to write nothing. The rest is as for `export`."""
    started = time.perf_counter()
    if not FILE_NAME.match(name):
        raise ExportError(f"name '{name}' must be letters, digits, '_', '-' and '.', to name a file")
    if not isinstance(model, nn.Module):
        raise ExportError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    wanted.check()
    # Before the tracing, which takes its time.
    with ExitStack() as stack:
        for folder in (folders or {}).values():
            stack.enter_context(folder_of(folder))
        filled = _filled(model, None if folders is None else weights)
        if lacking := [name for name, _ in model.named_parameters() if name in filled.missing]:
            # Tracing tells which are used, and may take minutes.
            logger.warning("weights: there is no value of %s: an error if the model uses it", named(lacking))
        traces = _traced(model, subgraphs, program, progress)
        if folders is not None:
            filled.check([tensor for traced in traces.values() for node, tensor in traced.bound.items() if node.users])
        trace_seconds = time.perf_counter() - started
        planner = Planner(model, traces, plan or Plan(auto=True), cuts, progress)
        size, count, compared = choose(planner, wanted)
        layouts = planner.lay_out(size, count)
        if strict and size > 1 and all(layout.planned.only_replicated for layout in layouts.values()):
            raise ExportError(f"the plan shards no parameter: {size} ranks would compute the same")
        shards = _assembled(name, layouts, count, inputs)
        if folders is not None:
            try:
                _write(folders, name, shards, traces, progress)
            except OSError as error:
                raise ExportError(f"the shards can't be written: {error}") from error
        return {
            subgraph: Report(
                name=name,
                out=None if folders is None else folders[subgraph],
                export_id=shards[subgraph][0][0].config.export_id,
                rank_size=size * count,
                stage_size=count,
                signature=shards[subgraph][0][0].config.signature,
                cuts=layout.cuts,
                stages=stage_reports(layout, shards[subgraph]),
                gathered=dict(layout.graphs[0].gathered),
                warnings=(*filled.warnings, *_warnings(layout)),
                trace_seconds=trace_seconds,
                seconds=time.perf_counter() - started,
                plan=layout.planned.plan,
                replicated=layout.planned.replicated,
                latency=layout.latency(Sizes.example(layout.traced)),
                interval=layout.interval(Sizes.example(layout.traced)),
                compared=compared,
                fixed=layout.traced.fixed,
            )
            for subgraph, layout in layouts.items()
        }


def _assembled(
    name: str, layouts: Mapping[str, Layout], stages: int, inputs: Mapping[str, Tensor] | None
) -> dict[str, list[list[RankShard]]]:
    """The shards of each subgraph, as `assemble` gives them. InvalidInput if `inputs` don't fit one of them."""
    signatures = {subgraph: _signature(layout.traced, layout.graphs[0]) for subgraph, layout in layouts.items()}
    if inputs is not None:
        for signature in signatures.values():
            bind(signature, inputs)
    state_id = uuid.uuid4().hex
    return with_all_weights(
        {
            subgraph: assemble(name, layout.traced, layout.graphs, signatures[subgraph], stages, state_id)
            for subgraph, layout in layouts.items()
        }
    )


def _traced(
    model: nn.Module, subgraphs: Mapping[str, Subgraph], program: ExportedProgram | None, progress: Progress
) -> dict[str, Trace]:
    traces: dict[str, Trace] = {}
    for number, (name, subgraph) in enumerate(subgraphs.items()):
        progress("tracing the model", number, len(subgraphs))
        with calling(model, subgraph.method):
            args, kwargs = pytree.tree_map_only(Tensor, _with_device, (tuple(subgraph.args), dict(subgraph.kwargs)))
            kwargs = ordered(model, kwargs)
            names = subgraph.input_names, subgraph.output_names
            traces[name] = trace(model, args, kwargs, subgraph.dynamic_shapes, *names, program)
            check_products(traces[name].graph)
    return with_own_constants(model, traces) if len(traces) > 1 else traces


def _with_device(example: Tensor) -> Tensor:
    """An example input on the meta device, as one that is made with its model there, is zeros on the CPU."""
    return hollow(example) if example.is_meta else example


def _filled(model: nn.Module, weights: Weights | Checkpoint | None) -> Filled:
    """`model` with the values of `weights`; nothing to do where it has its own."""
    if weights is None:
        return fill(model, None) if has_meta(model) else Filled()
    return fill(model, weights if isinstance(weights, Checkpoint) else load_checkpoint(weights))


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
) -> None:
    """The weights of a rank are written with the first subgraph, and linked to by the others."""
    tensors = {tensor: value for traced in traces.values() for tensor, value in traced.tensors.items()}
    count = sum(len(ranks) for stages in shards.values() for ranks in stages)
    with ExitStack() as stack:
        writers = {subgraph: Writer(folder, name) for subgraph, folder in folders.items()}
        for writer in writers.values():
            stack.callback(writer.discard)
        first: dict[int, Written] = {}
        done = 0
        for subgraph, stages in shards.items():
            for shard in (shard for ranks in stages for shard in ranks):
                progress("writing shards", done, count)
                done, rank = done + 1, shard.config.rank
                values = partial(shard.part, tensors=tensors)
                written = writers[subgraph].write(shard.config, shard.graph, shard.layout, values, first.get(rank))
                first.setdefault(rank, written)
        progress("writing shards", count, count)
        commit(list(writers.values()))


def _warnings(layout: Layout) -> tuple[str, ...]:
    found = [
        f"{op} takes whole tensors: sharded inputs are gathered for it ({count} time{'s' * (count > 1)})"
        + (
            "; if it cuts a fused projection in N, shard that as Shard(dim, blocks=N or the sizes)"
            if op in _CUTTING
            else ""
        )
        for op, count in layout.graphs[0].gathered.items()
    ]
    size = layout.tensor_parallel
    if size > 1 and layout.planned.only_replicated:
        found.append(f"no parameter is sharded: each of the {size} ranks of a stage computes the same")
    again = sum(layout.repeated.values())
    once = sum(rank.parameter_bytes for rank in (ranks[0] for ranks in layout.costs)) - again
    if again > planning.NOTABLE * once:
        names = list(dict.fromkeys(map(planning.pattern, layout.repeated)))
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        found.append(
            f"weights that are used on both sides of a cut lie in each of those stages, {again / once:.0%} more bytes: "
            f"{listed}"
        )
    return tuple(found)
