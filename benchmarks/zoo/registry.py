"""The zoo's models by name: small, built from their configurations, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


@dataclass(frozen=True)
class Case:
    """A model and how to export it.

    collectives: what a step of the hand-written plan issues on more than one tensor-parallel rank: 2 all-reduces a
    transformer block, 1 for what is made of vocabulary-sharded embeddings, 1 for each head or stem that is cut; None
    where nobody writes such a plan by hand. further: how many more on so many ranks, each for something that is whole
    on fewer, without which a rank would have more than 1.15 times its share of bytes or 1.2 times of FLOPs. bounded: a
    transformer or a recommender, of which a rank has to have its share of bytes and FLOPs. tensor_parallel: sizes that
    its heads allow. tolerance: the largest absolute error, in terms of the output's scale.
    """

    model: nn.Module
    kwargs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Any]
    collectives: int | None = None
    further: Mapping[int, int] = field(default_factory=dict)
    bounded: bool = False
    tensor_parallel: tuple[int, ...] = (2, 4)
    tolerance: float = 1e-4
    cuts: tuple[str, ...] = field(default=())

    def hand(self, tensor_parallel: int) -> int | None:
        """The collectives of the hand-written plan on so many ranks."""
        if tensor_parallel == 1:
            return 0
        return None if self.collectives is None else self.collectives + self.further.get(tensor_parallel, 0)


MODELS: dict[str, Callable[[], Case]] = {}


def model(function: Callable[[], Case]) -> Callable[[], Case]:
    """Register the function under its own name."""
    MODELS[function.__name__] = function
    return function


BATCH = Dim("batch", min=1, max=6)
LENGTH = Dim("length", min=2, max=24)
SOURCE = Dim("source", min=2, max=24)


def make(name: str) -> Case:
    """The model of this name, always with the same weights and example inputs."""
    torch.manual_seed(0)
    case = MODELS[name]()
    randomize(case.model)
    case.model.eval()
    return case


def randomize(module: nn.Module) -> None:
    """Weights that tell: initializers leave biases 0, norms 1 and matrices so small that an output hardly depends on
    them, and an error in one wouldn't be seen.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point() or name.endswith(("A_log", "dt_bias", ".D")):
                continue  # a state-space model's decay has to stay one
            if parameter.ndim >= 2:
                fan_in = max(1, min(parameter[0].numel(), parameter.numel() // parameter.shape[-1]))
                parameter.copy_(normal(parameter) / math.sqrt(fan_in))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * normal(parameter))
            else:
                parameter.copy_(parameter + 0.1 * normal(parameter))
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(0.1 * normal(layer.running_mean))
                layer.running_var.uniform_(0.5, 1.5, generator=generator)


def tokens(count: int, *shape: int) -> Tensor:
    """Ids of a vocabulary of `count`."""
    return torch.randint(count, shape)


def padding(batch: int, length: int, fill: int = 2) -> Tensor:
    """A mask whose last row is shorter by `fill`."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - fill :] = 0
    return mask
