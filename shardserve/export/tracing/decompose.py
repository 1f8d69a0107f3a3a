"""Operators that a shard may not call, taken apart into those that it may, where PyTorch knows how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions

from shardserve.export import refusals
from shardserve.shards import operators

Table = Mapping[torch._ops.OpOverload, Callable[..., Any]]


def table(graph: fx.Graph) -> Table:
    """How to take apart what the graph calls and a shard may not, and what comes of that; empty where it calls none.

    Operators that a shard may call are never in it: whole, they have rules, and kernels of their own.
    """
    calls = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    # Tracing once more takes as long as the first time: only for what can be taken apart.
    return _known() if calls & _known().keys() else {}


def _unlisted(op: torch._ops.OpOverload) -> bool:
    # What refusals have advice on would only be refused under another name.
    named = op.namespace == "aten" and not op._schema.is_mutable and not refusals.operator_advice(op._opname)
    # Sizes (sym_size) and checks are no operators of a shard, either; they give no tensors.
    tensors = any("Tensor" in str(result.type) for result in op._schema.returns)
    return named and tensors and not operators.is_allowed(op)


@lru_cache(maxsize=1)
def _known() -> Table:
    return {
        op: how
        for op, how in core_aten_decompositions().items()  # type: ignore[no-untyped-call]
        if isinstance(op, torch._ops.OpOverload) and _unlisted(op)
    }
