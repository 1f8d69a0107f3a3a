"""How far a tensor is from what it should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardserve.shards.graph import dtype_name


def abs_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two elements, of complex ones of a real or imaginary part; infinite for tensors of
    different shapes or dtypes.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    if not got.is_floating_point() and not got.is_complex():
        return _integer_error(_ordered(got), _ordered(wanted))
    got, wanted = _real(got), _real(wanted)
    same = (got == wanted) | ((got != got) & (wanted != wanted))  # infinities and NaNs that agree are no difference
    difference = (got.double() - wanted.double()).abs().masked_fill(same, 0.0)
    return float("inf") if bool(difference.isnan().any()) else float(difference.max())


def _integer_error(got: Tensor, wanted: Tensor) -> float:
    """Of int64, which a double doesn't tell apart from 2**53 on."""
    difference = torch.maximum(got, wanted) - torch.minimum(got, wanted)
    wrapped = difference[difference < 0]  # 2**63 and more
    return float(int(wrapped.max()) + (1 << 64) if wrapped.numel() else int(difference.max()))


def _ordered(tensor: Tensor) -> Tensor:
    """int64 with the same differences: of uint64, moved down by 2**63."""
    return tensor.view(torch.int64) ^ -(1 << 63) if tensor.dtype == torch.uint64 else tensor.long()


def _real(tensor: Tensor) -> Tensor:
    """Complex elements as two each."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two elements, divided by the largest finite magnitude in `wanted`: elements near zero
    would make it large where nothing is wrong.
    """
    error = abs_error(got, wanted)
    if not error:
        return 0.0
    magnitudes = _real(wanted).double().abs()
    finite = magnitudes[magnitudes.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return error / largest if largest else float("inf")


def close(got: Tensor, wanted: Tensor, atol: float, rtol: float) -> bool:
    """Whether every element differs by at most atol + rtol * |wanted|, and shapes and dtypes agree; integers by at most
    atol: an id is not nearly right.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if wanted.is_complex():
        return torch.allclose(
            got.to(torch.complex128), wanted.to(torch.complex128), rtol=rtol, atol=atol, equal_nan=True
        )
    if not wanted.is_floating_point():
        return abs_error(got, wanted) <= atol
    return torch.allclose(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)


@dataclass(frozen=True)
class OutputError:
    """How far an output is from the unsharded model's, over all sizes that were compared.

    `max_abs`: the largest difference of an element; `max_relative`: the largest, over the sizes, of that difference
    divided by the largest magnitude in the output; `where`: the sizes of `max_abs`.
    """

    name: str
    max_abs: float
    max_relative: float
    where: str


class Worst:
    """The largest errors of one output so far, and what of it there was nothing to compare in."""

    def __init__(self, name: str) -> None:
        self.name, self._abs, self._relative, self._where = name, 0.0, 0.0, ""
        self._finite, self._nans = False, ""
        self._without: set[str] = set()

    def take(self, got: Tensor, wanted: Tensor, where: str) -> None:
        """Another comparison."""
        error = abs_error(got, wanted)
        if error > self._abs or not self._where:
            kinds = [f"{dtype_name(tensor.dtype)} {list(tensor.shape)}" for tensor in (got, wanted)]
            differ = f", where it is {kinds[0]} and the model's {kinds[1]}" if kinds[0] != kinds[1] else ""
            self._abs, self._where = error, where + differ
        self._relative = max(self._relative, relative_error(got, wanted))
        if not wanted.numel():
            return
        nans = int((wanted != wanted).sum())
        if nans and not self._nans:
            self._nans = f"{nans} of {wanted.numel()} elements with {where}"
        if bool(wanted.isfinite().any() if wanted.is_complex() else wanted.double().isfinite().any()):
            self._finite = True
        else:
            self._without.add("infinite" if not nans else "nan" if nans == wanted.numel() else "nan or infinite")

    def error(self) -> OutputError:
        return OutputError(self.name, self._abs, self._relative, self._where)

    @property
    def uncompared(self) -> str:
        """What it is everywhere, if no comparison had a finite value: "nan", "infinite" …; infinities and NaNs that
        agree say nothing of the shards."""
        if self._finite or not self._without:
            return ""
        return next(iter(self._without)) if len(self._without) == 1 else "nan or infinite"

    @property
    def nans(self) -> str:
        """How much of it is NaN, and where that was first; empty where nothing is."""
        return self._nans
