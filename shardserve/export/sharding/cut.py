"""Pipeline stages: where they begin, and what crosses from each to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError
from shardserve.export.sharding.emit import LocalNode
from shardserve.export.sharding.propagate import Bound, KeptBuffer, LocalGraph
from shardserve.export.tracing.trace import Trace


@dataclass(frozen=True)
class StageGraph:
    """One stage of one coordinate."""

    receives: tuple[str, ...]
    sends: tuple[str, ...]
    parameters: tuple[Bound, ...]
    nodes: tuple[LocalNode, ...]
    state: tuple[KeptBuffer, ...] = ()


def modules(node: fx.Node) -> list[str]:
    """The modules that a node of the traced graph is in, outermost first; the root is left out.

    Further calls of a module that is called several times have "@1", "@2", … after its name.
    """
    names: list[str] = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        name = path.split("@")[0]
        if name and not name.startswith("_empty"):
            _, _, call = key.partition("@")
            names.append(f"{name}@{call}" if call.isdecimal() else name)
    return names


def assign(traced: Trace, cuts: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each call of the traced graph: stage i + 1 begins where the module cuts[i] does.

    Raises ExportError for a module that isn't there, that is named twice, or that begins where the cut that is named
    before it does, or before that.
    """
    for index, module in enumerate(cuts):
        if module in cuts[:index]:
            raise ExportError(f"cut '{module}' is given twice")
    stages: dict[fx.Node, int] = {}
    stage = 0
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        inside = modules(node)
        later = [index for index in range(stage, len(cuts)) if _within(inside, cuts[index])]
        if later:
            if later[0] > stage:
                raise ExportError(f"cut '{cuts[later[0]]}' begins before the cut '{cuts[stage]}'")
            if len(later) > 1:
                raise ExportError(f"cut '{cuts[later[1]]}' begins where the cut '{cuts[stage]}' does")
            stage += 1
        stages[node] = stage
    if stage < len(cuts):
        raise _not_called([traced], cuts[stage])
    return stages


def check_names(traces: Sequence[Trace], cuts: Sequence[str]) -> None:
    """ExportError for a cut that names nothing that one of these calls."""
    for module in cuts:
        if not any(_within(modules(node), module) for traced in traces for node in traced.graph.nodes):
            raise _not_called(traces, module)


def check_filled(traces: Sequence[Trace], stages: Sequence[Mapping[fx.Node, int]], cuts: Sequence[str]) -> None:
    """ExportError for a stage that does nothing with the inputs, or the buffers that are changed, in any of these."""
    if not cuts:
        return
    filled: set[int] = set()
    for traced, assigned in zip(traces, stages, strict=True):
        from_data = {node for _, node in traced.inputs}
        from_data |= {node for node, name in traced.bound.items() if name in traced.updates}
        for node, stage in assigned.items():
            values = node.meta.get("val")
            tensors = any(isinstance(value, Tensor) for value in pytree.tree_leaves(values))
            if tensors and any(source in from_data for source in node.all_input_nodes):
                from_data.add(node)
                filled.add(stage)
    for stage in range(len(cuts) + 1):
        if stage not in filled:
            edge = f"before cut '{cuts[stage]}'" if stage < len(cuts) else f"after cut '{cuts[-1]}'"
            raise ExportError(f"pipeline stage {stage}, {edge}, would do nothing with the inputs: move the cut")


def _not_called(traces: Sequence[Trace], module: str) -> ExportError:
    name, _, call = module.partition("@")
    called = {inside for traced in traces for node in traced.graph.nodes for inside in modules(node)}
    count = len({inside for inside in called if inside.split("@")[0] == name})
    if call and count:
        often = "once" if count == 1 else f"{count} times, the last of which is '{name}@{count - 1}'"
        return ExportError(f"cut '{module}': the model calls '{name}' {often}")
    return ExportError(f"cut '{module}' is not a module that the model calls")


def _within(inside: Sequence[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in inside)


def split(graph: LocalGraph, count: int) -> list[StageGraph]:
    """The stages of one coordinate's graph.

    Only what depends on the inputs' values crosses, through every stage between; the rest is computed again. A buffer
    that the model changes is in the stage that writes it, and crosses to later ones; ExportError if an earlier one
    uses it.
    """
    nodes = {node.name: node for node in graph.nodes}
    outputs = [value.name for value in graph.outputs]
    live = _needed([*outputs, *(kept.update for kept in graph.state if kept.update is not None)], nodes)
    homes = {kept.bound.name: kept.stage for kept in graph.state if kept.stage is not None}
    defined = {value.name: 0 for value in graph.inputs} | homes
    defined.update({node.name: node.stage for node in graph.nodes if node.from_data})
    last_use = dict.fromkeys(defined, 0)
    for node in graph.nodes:
        if node.name in live and node.from_data:
            for source in node.sources:
                if homes.get(source, 0) > node.stage:
                    tensor = next(kept.bound.tensor for kept in graph.state if kept.bound.name == source)
                    raise ExportError(
                        f"the model uses the buffer '{tensor}' in pipeline stage {node.stage} and changes it in stage "
                        f"{homes[source]}: move the cut"
                    )
                if source in last_use:
                    last_use[source] = max(last_use[source], node.stage)
    for kept in graph.state:
        if kept.update in last_use and kept.stage is not None:
            last_use[kept.update] = max(last_use[kept.update], kept.stage)
    for name in outputs:
        if name in last_use:
            last_use[name] = count - 1
    order = [value.name for value in graph.inputs] + list(homes) + [node.name for node in graph.nodes]
    stages: list[StageGraph] = []
    receives = tuple(value.name for value in graph.inputs)
    for stage in range(count):
        crossing = [name for name in order if name in defined and defined[name] <= stage < last_use[name]]
        sends = tuple(outputs if stage == count - 1 else crossing)
        stages.append(_stage(graph, stage, receives, sends, nodes, live))
        receives = sends
    return stages


def _needed(names: Sequence[str], nodes: Mapping[str, LocalNode]) -> set[str]:
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += nodes[name].sources if name in nodes else []
    return needed


def _stage(
    graph: LocalGraph,
    stage: int,
    receives: tuple[str, ...],
    sends: tuple[str, ...],
    nodes: Mapping[str, LocalNode],
    live: set[str],
) -> StageGraph:
    own = [node.name for node in graph.nodes if node.name in live and node.from_data and node.stage == stage]
    kept = {buffer.bound.name: buffer for buffer in graph.state if buffer.stage in (stage, None)}
    # What doesn't depend on the data is taken from wherever it is defined; the data-dependent part ends at `receives`.
    updates = [buffer.update for buffer in kept.values() if buffer.update is not None]
    pending, needed = [*own, *sends, *updates], set(receives)
    included: set[str] = set()
    while pending:
        name = pending.pop()
        if name in needed or name in included:
            continue
        included.add(name)
        pending += nodes[name].sources if name in nodes else []
    return StageGraph(
        receives,
        sends,
        tuple(parameter for parameter in graph.parameters if parameter.name in included),
        tuple(node for node in graph.nodes if node.name in included),
        tuple(buffer for name, buffer in kept.items() if name in included or buffer.update is not None),
    )
