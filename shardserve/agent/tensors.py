"""Tensors and the bytes of a frame's payload; for CUDA in pinned memory, which is copied while the CPU goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shardserve.shards.config import Signature, TensorSpec
from shardserve.wire.frames import Allocate, Buffer, Payload, split

logger = logging.getLogger(__name__)

# Combinations of dims whose shapes are remembered.
REMEMBERED = 1024


def buffers_of(tensors: Sequence[Tensor]) -> list[Buffer]:
    """The bytes of each tensor in C order, without a copy for those that are contiguous and on the CPU."""
    # A column's reshape is a view with gaps, which can't be seen as bytes.
    return [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]


def receiving_memory(device: torch.device) -> Allocate | None:
    """For payloads whose tensors `device` takes; None: any memory will do."""
    return pinned if device.type == "cuda" else None


def pinned(size: int) -> Payload:
    """So many bytes of pinned memory, or of other memory where that can't be had."""
    try:
        memory: Payload = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        # Not raised: this is the reading thread, and the connection would end with it. If the device is lost, the
        # thread of the steps says so.
        logger.warning("no pinned memory for %d bytes: %s", size, error)
        return np.empty(size, np.uint8)
    return memory


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, in pinned memory, of tensors on a CUDA device; there when its current stream was waited for."""
    copies = []
    for tensor in tensors:
        if not tensor.numel():
            copies.append(torch.empty(tensor.shape, dtype=tensor.dtype))
            continue
        memory = torch.from_numpy(pinned(tensor.nbytes)).view(tensor.dtype).reshape(tensor.shape)
        copies.append(memory.copy_(tensor, non_blocking=True))
    return copies


class Layout:
    """How the tensors of these specs lie in a payload, on `device` when they are taken from it."""

    def __init__(self, specs: Sequence[TensorSpec], signature: Signature, device: torch.device) -> None:
        self._specs = specs
        self._signature = signature
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._dtypes: list[torch.dtype] = [getattr(torch, spec.dtype) for spec in specs]
        self._shapes = lru_cache(REMEMBERED)(self._find_shapes)

    def _find_shapes(self, dims: tuple[tuple[str, int], ...]) -> tuple[list[tuple[int, ...]], list[int]]:
        """The shapes with these dims, and the sizes in bytes."""
        sizes = dict(dims)
        shapes = [self._signature.resolve(spec, sizes) for spec in self._specs]
        pairs = zip(shapes, self._dtypes, strict=True)
        return shapes, [math.prod(shape) * dtype.itemsize for shape, dtype in pairs]

    def tensors(self, payload: Payload, dims: Mapping[str, int]) -> list[Tensor]:
        """The tensors of a payload: views of it on the CPU; on a device copies that may still be under way, so that
        the payload has to stay until its stream was waited for. FrameError if it has another size.
        """
        shapes, sizes = self._shapes(tuple(dims.items()))
        tensors = [
            torch.from_numpy(view).view(dtype).reshape(shape)
            for view, dtype, shape in zip(split(payload, sizes), self._dtypes, shapes, strict=True)
        ]
        return tensors if self._on_cpu else [tensor.to(self._device, non_blocking=True) for tensor in tensors]
