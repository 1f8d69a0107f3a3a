"""What tracing doesn't see of the dtypes: it runs no operator, and fake products take operands that real ones don't."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from shardserve.errors import ExportError
from shardserve.export.refusals import module_of
from shardserve.shards.graph import dtype_name

_ALIKE: dict[str, slice] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot", "vdot"), slice(0, 2)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), slice(0, 2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), slice(0, 2)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), slice(1, 3)),
    "scaled_dot_product_attention": slice(0, 3),
}
"""The operands of a product that must have one dtype."""


def check_products(graph: fx.Graph) -> None:
    """ExportError for a product of tensors of different dtypes, as of an int64 example and a layer's float weight."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or (alike := _ALIKE.get(node.target._opname)) is None:
            continue
        values = [arg.meta["val"] for arg in node.args[alike] if isinstance(arg, fx.Node)]
        kinds = [dtype_name(value.dtype) for value in values if isinstance(value, Tensor)]
        if len(set(kinds)) > 1:
            module = module_of(node)
            where = f"module '{module}'" if module else "the model"
            raise ExportError(
                f"{where} multiplies {' by '.join(kinds)} ({node.target}), "
                "which raises when it runs: give the example another dtype, or convert it in the forward"
            )
