"""How far a tensor is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor


def abs_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two elements; infinite for tensors of different shapes or dtypes."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    same = (got == wanted) | ((got != got) & (wanted != wanted))  # infinities and NaNs that agree are no difference
    difference = (got.double() - wanted.double()).abs().masked_fill(same, 0.0)
    return float("inf") if bool(difference.isnan().any()) else float(difference.max())


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two elements, divided by the largest finite magnitude in `wanted`: elements near zero
    would make it large where nothing is wrong.
    """
    error = abs_error(got, wanted)
    if not error:
        return 0.0
    magnitudes = wanted.double().abs()
    finite = magnitudes[magnitudes.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return error / largest if largest else float("inf")


def close(got: Tensor, wanted: Tensor, atol: float, rtol: float) -> bool:
    """Whether every element differs by at most atol + rtol * |wanted|, and shapes and dtypes agree."""
    alike = got.shape == wanted.shape and got.dtype == wanted.dtype
    return alike and torch.allclose(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)
