"""The parts of a shard's graph that may be compiled: runs of operators between collectives.

A *region* takes tensors and the dims, and gives tensors. What decides by the data whether it raises (lookups, integer
division) stays outside, and so do collectives: an exception, and the count of collectives before it, are as without
compilation. A dim comes into a region as the size of an empty tensor, its *carrier*: compiled code takes tensors only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardserve.shards import expressions, operators

# Operators that never look at the values that they are given to decide whether they can be done.
_COMPUTE = """
    abs acos add addcdiv addcmul addmm amax amin arange asin atan baddbmm bitwise_and bitwise_not bitwise_or bmm cat
    ceil clamp clamp_max clamp_min clone contiguous cos cosh cumsum elu eq erf exp expm1 floor full full_like ge gelu
    gt hardsigmoid hardswish hardtanh layer_norm le leaky_relu linear log log1p log2 log_sigmoid log_softmax
    logical_and logical_not logical_or logical_xor lt masked_fill matmul maximum mean minimum mish mm mul
    native_layer_norm ne neg new_full new_ones new_zeros ones ones_like pow reciprocal relu relu6 rms_norm rsqrt rsub
    scalar_tensor select_scatter sigmoid sign silu sin sinh slice_scatter softmax softplus sqrt square stack sub sum
    tan tanh tril triu true_divide trunc var where zeros zeros_like _softmax _log_softmax __and__ __or__
"""
_VIEWS = """
    alias chunk detach expand expand_as flatten movedim narrow permute ravel reshape select slice split
    split_with_sizes squeeze swapaxes swapdims t to _to_copy transpose unbind unflatten unsqueeze _unsafe_view view
    view_as
"""
VIEWS = frozenset(_VIEWS.split())
COMPILED = frozenset(_COMPUTE.split()) | VIEWS
# Without a rounding mode, with which a zero divisor raises, if the numbers are integers.
DIVISIONS = frozenset({torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar})
# For integers inductor (torch 2.13) takes the result for float32: the compiled code ends the process.
_MISCOMPILED = frozenset({torch.ops.aten.pow.Scalar})
_SIZES = frozenset({*expressions.FUNCTIONS.values(), *operators.SYMBOLIC.values()})
# Fewer operators that compute: nothing to fuse.
LEAST = 2

Run = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass
class Region:
    """Nodes in order; `inputs` and `outputs` are the tensors that cross its border. All inputs are there at `last`."""

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    last: fx.Node | None = None


def carrier(size: int) -> Tensor:
    """An empty tensor of shape [size, 0]."""
    return torch.empty((size, 0))


def find_regions(graph: fx.Graph, dims: int) -> list[Region]:
    """The regions of a Program's graph, whose first `dims` placeholders are the dims; the same for the same graph."""
    sizes = _sizes(graph, dims)
    owner: dict[fx.Node, Region] = {}
    regions: list[Region] = []
    current: Region | None = None
    for node in graph.nodes:
        if node.op != "call_function" or node in sizes:
            continue
        if node.target is operator.getitem:
            # With the operator that it takes a result of, so that no tuple crosses a border.
            parent = owner.get(node.args[0])
            if parent is not None:
                parent.nodes.append(node)
                owner[node] = parent
        elif _compiles(node):
            if current is None:
                current = Region()
                regions.append(current)
            current.nodes.append(node)
            current.last = node
            owner[node] = current
        else:
            current = None
    for region in regions:
        inside = set(region.nodes)
        inputs = {i: None for node in region.nodes for i in node.all_input_nodes if i not in inside and i not in sizes}
        region.inputs = list(inputs)
        region.outputs = [node for node in region.nodes if any(user not in inside for user in node.users)]
    return [region for region in regions if sum(not _is_view(node) for node in region.nodes) >= LEAST]


def _sizes(graph: fx.Graph, dims: int) -> set[fx.Node]:
    """Dims and the numbers that follow from them."""
    sizes = set(list(graph.nodes)[:dims])
    sizes |= {node for node in graph.nodes if node.op == "call_function" and node.target in _SIZES}
    return sizes


def _name(node: fx.Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or _name(node) in VIEWS


def _compiles(node: fx.Node) -> bool:
    return (_name(node) in COMPILED or node.target in DIVISIONS) and node.target not in _MISCOMPILED


def region_graph(graph: fx.Graph, dims: int, region: Region) -> fx.Graph:
    """The region alone, as a function of the carriers of all dims, then of its inputs."""
    alone = fx.Graph()
    carriers = [alone.placeholder(f"carrier{index}") for index in range(dims)]
    known: dict[fx.Node, Any] = {}
    for index, node in enumerate(region.inputs):
        known[node] = alone.placeholder(f"input{index}")
    numbers = list(graph.nodes)[:dims]
    for placeholder, number in zip(carriers, numbers, strict=True):
        known[number] = alone.call_function(torch.ops.aten.sym_size.int, (placeholder, 0))
    sizes = _sizes(graph, dims)

    def copy(node: fx.Node) -> Any:
        if node not in known:
            assert node in sizes
            known[node] = alone.node_copy(node, copy)
        return known[node]

    for node in region.nodes:
        known[node] = alone.node_copy(node, copy)
    alone.output([known[node] for node in region.outputs])
    # Equal regions, of equal layers, get equal source.
    for index, node in enumerate(alone.nodes):
        node._rename(f"v{index}")
    return alone


def replace_regions(graph: fx.Graph, dims: int, regions: Sequence[Region], runs: Sequence[Run | None]) -> fx.Graph:
    """The graph with each region that has a function replaced by a call of it."""
    whole = fx.Graph()
    known: dict[fx.Node, Any] = {}
    called = {region.last: (region, run) for region, run in zip(regions, runs, strict=True) if run is not None}
    inside = {node for region, _ in called.values() for node in region.nodes}
    carriers: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = whole.placeholder(node.name)
            continue
        if not carriers:
            carriers = [whole.call_function(carrier, (known[number],)) for number in list(graph.nodes)[:dims]]
        if node in called:
            region, run = called[node]
            inputs = [*carriers, *(known[i] for i in region.inputs)]
            results = whole.call_function(run, (inputs,))
            for index, output in enumerate(region.outputs):
                known[output] = whole.call_function(operator.getitem, (results, index))
        elif node not in inside:
            known[node] = whole.node_copy(node, lambda n: known[n])
    return whole
