"""Tensors and the bytes of a frame's payload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardserve.shards.config import Signature, TensorSpec
from shardserve.wire.frames import Buffer, Payload, split


def buffers_of(tensors: Sequence[Tensor]) -> list[Buffer]:
    """The bytes of each tensor in C order, without a copy for those that are contiguous and on the CPU."""
    return [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]


def tensors_of(
    payload: Payload,
    specs: Sequence[TensorSpec],
    signature: Signature,
    dims: Mapping[str, int],
    device: torch.device,
) -> list[Tensor]:
    """The tensors of a payload by their specs: views of it on the CPU. FrameError if it has another size."""
    shapes = [signature.resolve(spec, dims) for spec in specs]
    dtypes: list[torch.dtype] = [getattr(torch, spec.dtype) for spec in specs]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    return [
        torch.from_numpy(view).view(dtype).reshape(shape).to(device)
        for view, dtype, shape in zip(split(payload, sizes), dtypes, shapes, strict=True)
    ]
