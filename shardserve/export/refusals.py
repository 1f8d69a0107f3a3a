"""What to try when a model can't be exported: by the kind of torch.export's error, and by operator."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from shardserve.errors import ExportError

_LARGEST_RUN = 10**9
"""Bytes of the parameters and buffers of a model that is run to find out why it can't be traced."""

_HINTS = re.compile(
    r"\n+(For more information|For extended logs|If you suspect|For more debugging|For C\+\+ stack|The error above|"
    r"User Stack|To fix the error|The following call raised|  \(Snipped|consider using data-dependent).*",
    re.DOTALL,
)
"""What torch adds to a message for those who debug torch."""
_ASIDES = re.compile(r" For more information(, run with TORCH_LOGS=\S+|[^\n]* https?://\S+)")
"""The same in the middle of one."""

_DATA = (
    "an `if`, a loop or a size depends on the values of a tensor. Write torch.where instead of the `if`, "
    "keep the size fixed and mask what doesn't count, and use no .item() or .tolist() of an input"
)
_ADVICE: tuple[tuple[str, str], ...] = (
    (r"data-dependent|DataDependentOutput|DynamicOutputShape|_local_scalar_dense", _DATA),
    (
        r"specialized it to be a constant \([01]\)",
        "use an example of size 2 or more: torch.export takes sizes 0 and 1 for constants. The range may begin at 1",
    ),
    (
        r"specialized it to be a constant|Constraints violated",
        "take that dim out of dynamic_shapes, which fixes its size, or find where the model takes the size for a "
        "number: a shape written out (use -1 or x.shape), a table of that length, a Python loop over it",
    ),
    (
        r"dynamic[_-]shapes",
        "dynamic_shapes has the form of the inputs: a dict with forward's parameters for keys, or a tuple; "
        "for each tensor {axis: torch.export.Dim(…)} or None",
    ),
    (
        r"not a known type|register a pytree",
        "return tensors in tuples, lists and dicts, or make the class known before: "
        "torch.utils._pytree.register_dataclass(CLASS) for a dataclass, register_pytree_node for another",
    ),
    (
        r"no fake impl|UnsupportedOperator|FakeTensor.*(?:kernel|impl)|Operator does not support running with fake",
        "shards run PyTorch's own operators: replace the custom operator by those",
    ),
    (
        r"\.numpy\(\)|numpy|data pointer|data_ptr|storage",
        "what leaves PyTorch (NumPy, other libraries, pointers) can't be traced: use torch operators, or do that part "
        "in a Python stage before or after the model",
    ),
    (r"ScriptModule", "export the nn.Module that it was scripted from"),
    (
        r"uninitialized parameter",
        "run the model once on the example inputs before, so that it has all of its parameters",
    ),
)
_OPERATORS: Mapping[str, str] = {
    **dict.fromkeys(("item", "_local_scalar_dense"), "keep it a tensor: x * y.max() instead of x * y.max().item()"),
    **dict.fromkeys(
        ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
        "how much it gives depends on the inputs' values: keep the size fixed and mask what doesn't count",
    ),
    **dict.fromkeys(
        ("dropout", "native_dropout", "rrelu", "rrelu_with_noise_functional"),
        "it draws random numbers; in evaluation mode its module (nn.Dropout, nn.RReLU) draws none",
    ),
    **dict.fromkeys(
        ("rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial", "normal"),
        "it draws random numbers, and ranks have to agree: make them outside, as an input of the model",
    ),
    **dict.fromkeys(
        ("quantize_per_tensor", "quantize_per_channel", "dequantize"),
        "quantized tensors can't be stored: keep int8 weights with a scale, and multiply them out",
    ),
}


_FUNCTIONS: Mapping[str, str] = {
    "cond": "compute both and choose by torch.where",
    **dict.fromkeys(
        ("while_loop", "scan", "map_impl", "associative_scan"),
        "write a Python loop with as many rounds as the shapes say, and torch.where for what ends earlier",
    ),
}
"""Operators that call functions of the model's."""


def refuse_functions(graph: fx.Graph) -> None:
    """ExportError if an operator of the graph takes functions, as torch.cond does: a shard is one list of calls."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            name = node.target._name
            advice = f": {_FUNCTIONS[name]}" if name in _FUNCTIONS else ""
            raise ExportError(f"operator {name}{in_module(node)} takes functions, which shards can't have{advice}")


def explain(error: Exception, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Why torch.export can't trace the model: its message, where in the model that was, and what to try."""
    raised = _raised(model, args, kwargs) if _may_run(model) else None
    if raised is not None:
        return f"the model raises on the example inputs: {_message(raised)}{_place(raised)}"
    text = f"torch.export can't trace the model: {_message(error)}{_place(error)}"
    kind = f"{type(error).__name__}: {error}"
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, kind)), None)
    if advice is None:
        advice = "torch.export.draft_export(model, args, kwargs) lists all that it can't trace"
    return f"{text}\nWhat to try: {advice}"


def operator_advice(opname: str) -> str:
    """What to try where the model uses an operator that shards don't have; empty where nothing is known."""
    advice = _OPERATORS.get(opname)
    return f"; {advice}" if advice else ""


def module_of(node: fx.Node) -> str:
    """The innermost module that a traced operator belongs to; empty for the model itself, and where that is unknown."""
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack else ""


def in_module(node: fx.Node) -> str:
    """The same as words of a message, "in module 'blocks.0'", after a space; nothing where it is the model's own."""
    module = module_of(node)
    return f" in module '{module}'" if module else ""


def _may_run(model: nn.Module) -> bool:
    """Whether the model can be run for an error's sake: not if it has no values (meta), if that would give its lazy
    parameters their shapes, or if it may take minutes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return False
    return sum(tensor.nbytes for tensor in tensors) <= _LARGEST_RUN


def _raised(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """What the model raises without being traced. Its buffers are afterwards as before."""
    with torch.no_grad():
        # Of a ScriptModule, buffers can be filled and not replaced.
        own = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        buffers = [(module, dict(module._buffers)) for module in own]
        values = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 -- whatever the model's own code raises
            return error
        finally:
            for module, named in buffers:
                module._buffers.update(named)
            for buffer, value in values:
                buffer.copy_(value)
    return None


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {_ASIDES.sub('', _HINTS.sub('', str(error))).strip()}"


def _place(error: Exception) -> str:
    """The innermost line of code that is neither PyTorch's nor ours, nor Python's own."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    python = sysconfig.get_path("stdlib")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        installed = "site-packages" in Path(frame.filename).parts
        if not frame.filename.startswith((*ours, "<")) and (installed or not frame.filename.startswith(python)):
            return f"\nIn {frame.filename}:{frame.lineno}, {frame.name}: {frame.line}"
    return ""
