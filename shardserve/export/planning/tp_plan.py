"""Hugging Face's `tp_plan`, name patterns of modules and parameters → styles, as placements of the parameters.

What a style does to activations follows here from the operators' rules; only how it cuts parameters is taken over. The
styles are those of transformers 5.x (`distributed/tensor_parallel.py`, `distributed/expert_parallel.py`) and 4.5x
(`integrations/tensor_parallel.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export.sharding.placements import Replicate, Shard

_Style = Callable[[str, Tensor], Replicate | Shard]
"""Of a parameter, by its own name and shape."""


def _colwise(blocks: int) -> _Style:
    """By outputs: the last but one dim of linear weights and of experts' stacks, and the bias with it."""
    return lambda name, value: Shard(max(value.ndim - 2, 0), blocks)


def _rowwise(blocks: int) -> _Style:
    """By inputs: the last dim; the bias is added once."""
    return lambda name, value: Replicate() if name == "bias" or value.ndim < 2 else Shard(value.ndim - 1, blocks)


def _dim(dim: int) -> _Style:
    return lambda name, value: Shard(dim)


def _whole(name: str, value: Tensor) -> Replicate:
    return Replicate()


STYLES: Mapping[str, _Style] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "colwise_rep", "local_colwise"), _colwise(1)),
    **dict.fromkeys(("rowwise", "rowwise_split_input", "rowwise_rep", "local_rowwise"), _rowwise(1)),
    "packed_colwise": _colwise(2),
    **dict.fromkeys(("packed_rowwise", "local_packed_rowwise"), _rowwise(2)),
    "embedding_rowwise": _dim(0),
    "embedding_colwise": _dim(1),
    "grouped_gemm": _dim(0),
    # These only change activations or gradients.
    **dict.fromkeys(("replicate", "replicated_with_grad_allreduce", "sequence_parallel", "all_reduce"), _whole),
    **dict.fromkeys(("moe_tp_experts", "moe_identity_expert", "ep_dispatch_experts", "mla_kv_a_proj"), _whole),
    **dict.fromkeys(("local", "local_params", "gather"), _whole),
}


def tp_plan(model: nn.Module) -> dict[str, str]:
    """The model's own plan: `model.tp_plan`, as a module of transformers gives it, or what older ones have instead,
    `model._tp_plan` and, of the base model, `model.config.base_model_tp_plan`. ExportError if there is none.
    """
    found: dict[str, str] = {}
    own = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    base = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if base:
        prefix = getattr(model, "base_model_prefix", "")
        inside = prefix and isinstance(getattr(model, prefix, None), nn.Module)
        found.update({f"{prefix}.{pattern}" if inside else pattern: style for pattern, style in base.items()})
    found.update(own or {})
    if not found:
        raise ExportError(f"{type(model).__name__} has no tp_plan: give a plan file, or --plan auto")
    return found


def parameters(model: nn.Module) -> dict[str, str]:
    """Name of a parameter → placement, of those that the model's plan cuts.

    A pattern names a module, for its own parameters, or one parameter, which goes before its module; `*` is one part
    of a name. ExportError names the pattern of an unknown style.
    """
    plan = tp_plan(model)
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ExportError(f"tp_plan: '{pattern}' has the style '{style}'; known: {', '.join(sorted(STYLES))}")
    patterns = [
        (re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + r"\Z"), STYLES[style])
        for pattern, style in plan.items()
    ]
    found: dict[str, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        module, _, own = name.rpartition(".")
        cutting = _first(patterns, name) or _first(patterns, module)
        placement = cutting(own, value) if cutting is not None else Replicate()
        if isinstance(placement, Shard) and value.ndim:
            found[name] = str(placement)
    if not found:
        raise ExportError(f"the tp_plan of {type(model).__name__} cuts none of its parameters: {plan}")
    return found


def _first(patterns: list[tuple[re.Pattern[str], _Style]], name: str) -> _Style | None:
    return next((style for pattern, style in patterns if pattern.match(name)), None)
