"""Recurrent layers stay one operator while a model is traced, so that the length of a sequence may vary.

torch.export runs an LSTM on fake tensors by a loop over the positions, which fixes their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
"""Name of torch's function and operator → how many states it has."""
_ARGUMENTS = 9
_BIDIRECTIONAL = 4


def _define(name: str, states: int) -> None:
    """Registers shardserve::NAME, which stands for aten.NAME.input."""
    whole = getattr(torch.ops.aten, name).input
    state = "Tensor[] hx" if states > 1 else "Tensor hx"
    settings = "bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
    results = ", ".join(["Tensor"] * (1 + states))
    torch.library.define(f"shardserve::{name}", f"(Tensor input, {state}, Tensor[] params, {settings}) -> ({results})")
    torch.library.impl(f"shardserve::{name}", "CompositeExplicitAutograd", whole)

    def shapes(x: Tensor, hx: Any, params: Sequence[Tensor], *settings: Any) -> tuple[Tensor, ...]:
        """An output of both directions for each position, and the last states."""
        held = list(hx) if states > 1 else [hx]
        width = held[0].shape[-1] * (2 if settings[_BIDIRECTIONAL] else 1)
        return x.new_empty((*x.shape[:-1], width)), *map(torch.empty_like, held)

    torch.library.register_fake(f"shardserve::{name}", shapes)


for _name, _count in _STATES.items():
    _define(_name, _count)


class Kept(TorchFunctionMode):
    """Inside it, torch's recurrent functions on padded sequences are the operators that stand for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        # Of a packed sequence the third argument is the states, not the parameters.
        if name in _STATES and len(args) == _ARGUMENTS and not kwargs and isinstance(args[6], bool):
            return getattr(torch.ops.shardserve, name)(*args)
        return func(*args, **(kwargs or {}))


def restore(graph: fx.Graph) -> None:
    """PyTorch's own operators again, in a graph that was traced inside `Kept`."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "shardserve":
            node.target = getattr(torch.ops.aten, node.target._opname).input
