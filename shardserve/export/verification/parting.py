"""Where the values of the shards and those of the unsharded model part: at the first pipeline cut that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardserve.errors import ExportError
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.tracing.trace import Trace, evaluating, trace
from shardserve.export.verification.compare import abs_error, close
from shardserve.export.verification.running import Shards
from shardserve.export.writing.origins import rank_part, sum_of_terms
from shardserve.export.writing.write import part
from shardserve.shards.config import Origin, TensorSpec
from shardserve.shards.program import Program

MOST_BLOCKS = 64
MOST_NAMES = 3


def where_they_part(
    shards: Shards,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    inputs: Mapping[str, Tensor],
    atol: float,
    rtol: float,
) -> str:
    """A sentence on the first pipeline stage that gives other values than the whole model does, for these inputs, and
    on those of its weights that aren't the model's.

    The model is traced again, as for the export, from the example in `args` and `kwargs`: its graph's nodes have the
    names that the shards have for what crosses a cut. Raises ExportError where that can't be done.
    """
    traced = trace(model, args, kwargs, dynamic_shapes, None, None)
    if any(tensor.is_meta for tensor in traced.tensors.values()):
        raise ExportError("the model's parameters have no values here")
    said, stage = _stage(shards, model, traced, inputs, (atol, rtol))
    wrong = [name for program in stage for name in _wrong_weights(program, traced.tensors)]
    return f"{said}; its weights that aren't the model's: {_some(wrong)}" if wrong else said


def _stage(
    shards: Shards, model: nn.Module, traced: Trace, inputs: Mapping[str, Tensor], tolerances: tuple[float, float]
) -> tuple[str, Sequence[Program]]:
    """What is to be said of the stage, and its ranks; without ranks where it isn't known."""
    *before, last = shards.stages
    if not before:
        return "there is one pipeline stage, so no cut at which to look", last
    origins = {origin.tensor for stage in before for origin in stage[0].config.origins} - {""}
    whole = _unsharded(model, traced, inputs, origins)
    dims = shards.bind(inputs)
    looked = 0
    for stage, ranks in zip(before, shards.run_stages(inputs), strict=False):
        config = stage[0].config
        for index, (spec, origin) in enumerate(zip(config.sends, config.origins, strict=False)):
            if origin.tensor not in whole:
                continue
            found = _difference([tensors[index] for tensors in ranks], whole[origin.tensor], origin, dims, tolerances)
            looked += found is not None
            if found:
                return (
                    f"they part in pipeline stage {config.stage}: {_of(spec, origin)}{_on(config.rank, found)}",
                    stage,
                )
    if not looked:
        return "where they part can't be told: the shards don't say what crosses their cuts", ()
    return f"they part in pipeline stage {last[0].config.stage}, the last: what comes to it is right", last


def _wrong_weights(program: Program, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    config = program.config
    for name, tensor in zip(program.tensor_names, program.parameters, strict=True):
        if name in tensors and not _is_part(tensor, tensors[name], config.tensor_parallel_size, config.coordinate):
            yield f"'{name}' on rank {config.rank}"


def _is_part(tensor: Tensor, whole: Tensor, ranks: int, coordinate: int) -> bool:
    """Whether it is the whole, or a rank's part of one of its dims, in however many blocks."""
    ways = ways_to_cut(whole.shape, tensor.shape, ranks)
    if any(abs_error(tensor, part(whole, way, ranks, coordinate)) == 0 for way in ways):
        return True
    cut = [dim for dim, (size, own) in enumerate(zip(whole.shape, tensor.shape, strict=False)) if size != own]
    if whole.ndim != tensor.ndim or len(cut) != 1:
        return False
    return _in_unequal_blocks(tensor.movedim(cut[0], 0), whole.detach().movedim(cut[0], 0), ranks, coordinate)


def _in_unequal_blocks(tensor: Tensor, whole: Tensor, ranks: int, coordinate: int) -> bool:
    """Whether these are the rank's rows of blocks of some sizes; each is taken to be as long as it agrees."""
    begin = taken = 0
    while taken < len(tensor):
        rows, left = tensor[taken:], whole[begin:]
        lengths = range(min(len(rows), len(left) // ranks), 0, -1)
        length = next((length for length in lengths if _agree(rows, left[coordinate * length :], length)), 0)
        if not length:
            return False
        taken, begin = taken + length, begin + length * ranks
    return begin == len(whole)


def _agree(rows: Tensor, others: Tensor, length: int) -> bool:
    # The last one tells mostly, and is cheaper than all.
    return torch.equal(rows[length - 1], others[length - 1]) and torch.equal(rows[:length], others[:length])


def ways_to_cut(whole: Sequence[int], local: Sequence[int], ranks: int) -> Iterator[Replicate | Shard]:
    """The placements, of equal blocks, that may have given a rank a tensor of the shape `local` of one of `whole`."""
    if whole == local:
        yield Replicate()
        return
    cut = [dim for dim, (size, own) in enumerate(zip(whole, local, strict=False)) if size != own]
    if len(whole) == len(local) and len(cut) == 1:
        size = whole[cut[0]]
        yield from (Shard(cut[0], count) for count in range(1, MOST_BLOCKS + 1) if size % (ranks * count) == 0)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest


def _unsharded(model: nn.Module, traced: Trace, inputs: Mapping[str, Tensor], names: set[str]) -> Mapping[str, Tensor]:
    given: dict[fx.Node, Any] = {node: traced.tensors[name] for node, name in traced.bound.items()}
    given.update(traced.constants)
    given.update(zip((node for _, node in traced.inputs), inputs.values(), strict=True))
    recorder = _Recorder(traced.graph, names)
    with evaluating(model):
        recorder.run(*(given[node] for node in traced.graph.nodes if node.op == "placeholder"))
    return recorder.tensors


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the tensors of these names."""

    def __init__(self, graph: fx.Graph, names: set[str]) -> None:
        super().__init__(fx.GraphModule(nn.Module(), graph))
        self._names = names
        self.tensors: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, Tensor):
            self.tensors[n.name] = result
        return result


def _difference(
    sent: Sequence[Tensor], whole: Tensor, origin: Origin, dims: Mapping[str, int], tolerances: tuple[float, float]
) -> dict[int | None, float] | None:
    """By tensor-parallel rank (None: the ranks together) how far what it sends is off, if it is; None: unknown."""
    total = sum_of_terms(sent, origin.placement)
    compared: dict[int | None, tuple[Tensor, Tensor]] = {}
    if total is not None:
        compared[None] = total, whole
    else:
        for coordinate, tensor in enumerate(sent):
            wanted = rank_part(whole, len(sent), coordinate, origin.placement, dims)
            if wanted is None:
                return None
            compared[coordinate] = tensor, wanted
    # The shards' shapes are checked as they run: the name means something else in this trace.
    if any(got.shape != wanted.shape for got, wanted in compared.values()):
        return None
    return {
        rank: abs_error(got, wanted) for rank, (got, wanted) in compared.items() if not close(got, wanted, *tolerances)
    }


def _of(spec: TensorSpec, origin: Origin) -> str:
    module = f" of module '{origin.module}'" if origin.module else ""
    return f"'{spec.name}'{module}, which it sends to the next, is off by up to "


def _on(first: int, found: Mapping[int | None, float]) -> str:
    worst = f"{max(found.values()):.3g}"
    ranks = [first + coordinate for coordinate in found if coordinate is not None]
    return f"{worst} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else worst
