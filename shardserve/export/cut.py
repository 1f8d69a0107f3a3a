"""Pipeline stages: where they begin, and what crosses from each to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from torch import fx

from shardserve.errors import ExportError
from shardserve.export.emit import LocalNode
from shardserve.export.propagate import Bound, LocalGraph
from shardserve.export.trace import Trace

MAX_PARTITIONS = 20000


@dataclass(frozen=True)
class StageGraph:
    """One stage of one coordinate."""

    receives: tuple[str, ...]
    sends: tuple[str, ...]
    parameters: tuple[Bound, ...]
    nodes: tuple[LocalNode, ...]


def modules(node: fx.Node) -> list[str]:
    """The names of the modules that a node of the traced graph is in, outermost first; the root is left out."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    # A module that is called twice has "@1" after its name the second time.
    return [path.split("@")[0] for path, _ in stack if path and not path.startswith("_empty")]


def assign(traced: Trace, cuts: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each call of the traced graph: stage i + 1 begins where the module cuts[i] does.

    Raises ExportError for a module that isn't there, or that begins before the cut that is named before it.
    """
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
            stage += 1
        stages[node] = stage
    if stage < len(cuts):
        raise ExportError(f"cut '{cuts[stage]}' is not a module that the model calls")
    return stages


def _within(inside: Sequence[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in inside)


def balance(traced: Trace, count: int) -> tuple[str, ...]:
    """The modules at which to cut into `count` stages so that the largest has the fewest parameter bytes.

    Candidates are the elements of the model's lists of modules (names that end in a number), or, without enough of
    them, its outermost modules.
    """
    starts, sizes = _candidates(traced, numbered=True)
    if len(starts) < count - 1:
        starts, sizes = _candidates(traced, numbered=False)
    if len(starts) < count - 1:
        raise ExportError(f"the model has {len(starts)} modules to cut at; {count} stages need {count - 1}: give cuts")
    names = list(starts)
    best = min(
        _partitions(names, sizes, count),
        key=lambda chosen: max(_stage_bytes(chosen, sizes)),
    )
    return tuple(names[index] for index in best)


def _candidates(traced: Trace, numbered: bool) -> tuple[dict[str, int], list[int]]:
    """Module names in the order in which they begin, and the bytes of parameters first used before each and after."""
    starts: dict[str, int] = {}
    sizes = [0]
    seen: set[str] = set()
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        inside = modules(node)
        wanted = [name for name in inside if name.rsplit(".", 1)[-1].isdecimal()] if numbered else inside
        outer = wanted[0] if wanted else None
        if outer is not None and outer not in starts:
            starts[outer] = len(starts)
            sizes.append(0)
        for source in node.all_input_nodes:
            tensor = traced.bound.get(source)
            if tensor is not None and tensor not in seen:
                seen.add(tensor)
                sizes[-1] += traced.tensors[tensor].nbytes
    return starts, sizes


def _partitions(names: Sequence[str], sizes: Sequence[int], count: int) -> list[tuple[int, ...]]:
    chosen: list[tuple[int, ...]] = []
    # The first candidate may begin the model itself: a cut there would leave the first stage empty.
    first = 0 if sizes[0] else 1
    for partition in combinations(range(first, len(names)), count - 1):
        chosen.append(partition)
        if len(chosen) > MAX_PARTITIONS:
            return _greedy(names, sizes, count)
    if not chosen:
        raise ExportError(f"the model's {len(names)} modules don't make {count} stages: give cuts")
    return chosen


def _greedy(names: Sequence[str], sizes: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Cut where each stage has had its equal share: for models with too many modules to try every partition."""
    share, cuts, filled = sum(sizes) / count, list[int](), sizes[0]
    for index in range(len(names)):
        if (index and filled >= share * (len(cuts) + 1)) or len(names) - index == count - 1 - len(cuts):
            cuts.append(index)
        if len(cuts) == count - 1:
            break
        filled += sizes[index + 1]
    return [tuple(cuts)]


def _stage_bytes(chosen: Sequence[int], sizes: Sequence[int]) -> list[int]:
    edges = [0, *(index + 1 for index in chosen), len(sizes)]
    return [sum(sizes[start:end]) for start, end in pairwise(edges)]


def split(graph: LocalGraph, count: int) -> list[StageGraph]:
    """The stages of one coordinate's graph.

    Only what depends on the inputs' values crosses, through every stage between; the rest is computed again.
    """
    nodes = {node.name: node for node in graph.nodes}
    outputs = [value.name for value in graph.outputs]
    live = _needed(outputs, nodes)
    defined = {value.name: 0 for value in graph.inputs}
    defined.update({node.name: node.stage for node in graph.nodes if node.from_data})
    last_use = dict.fromkeys(defined, 0)
    for node in graph.nodes:
        if node.name in live and node.from_data:
            for source in node.sources:
                if source in last_use:
                    last_use[source] = max(last_use[source], node.stage)
    for name in outputs:
        if name in last_use:
            last_use[name] = count - 1
    order = [value.name for value in graph.inputs] + [node.name for node in graph.nodes]
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
    # What doesn't depend on the data is taken from wherever it is defined; the data-dependent part ends at `receives`.
    pending, needed = [*own, *sends], set(receives)
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
    )
