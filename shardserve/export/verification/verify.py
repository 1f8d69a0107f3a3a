"""`verify`: reads the shards back from disk, runs them all, and compares with the unsharded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export.verification.compare import OutputError, Worst, close
from shardserve.export.verification.parting import where_they_part
from shardserve.export.verification.running import Shards
from shardserve.export.verification.sizes import cases, in_words, inputs_of
from shardserve.export.verification.unsharded import Unsharded, restoring
from shardserve.progress import Progress, quietly


@dataclass(frozen=True)
class VerifyResult:
    """`max_abs_error` over all outputs and `sizes`; `worst`: where it was; `passed`: within tolerance everywhere; else
    `parting`: a sentence on the first pipeline stage whose values aren't the unsharded model's. `notes`: what could not
    be compared, and why.
    """

    max_abs_error: float
    worst: str
    passed: bool
    sizes: tuple[Mapping[str, int], ...]
    outputs: tuple[OutputError, ...] = ()
    parting: str = ""
    notes: tuple[str, ...] = ()


def verify(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out: str | Path,
    name: str,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Progress = quietly,
    inputs: Mapping[str, Tensor] | None = None,
    dynamic_shapes: Any = None,
) -> VerifyResult:
    """Compare the shards in `out` with `model` at the example's sizes and at the ends of each dynamic dim's range.

    `inputs`, by the signature's names, take the place of the example's tensors. Inputs of other sizes take their values
    from these, so that ids stay ids and masks stay masks. `progress` hears of the shards that are read and of the sizes
    that are compared. `dynamic_shapes`, those of the export, are for tracing the model again where values part. Raises
    InvalidInput for inputs that the model doesn't take. A model that changes its buffers does two steps of each size,
    and gets its buffers back.
    """
    shards = Shards(out, name, progress)
    whole = Unsharded(model, args, kwargs, shards.signature)
    example = whole.example
    if inputs is not None:
        shards.bind(inputs)
        example = {spec.name: inputs[spec.name] for spec in shards.signature.inputs}
    generator = torch.Generator().manual_seed(0)
    errors = [Worst(spec.name) for spec in shards.signature.outputs]
    failed: Mapping[str, Tensor] | None = None
    found = cases(shards.signature, example)
    for done, dims in enumerate(found):
        progress("comparing sizes", done, len(found))
        given = inputs_of(shards.signature, example, dims, generator) if done else example
        with _as_it_was(model, shards):
            for again in ("", " in a second step")[: 2 if shards.state else 1]:
                for worst, got, wanted in zip(errors, shards.run(given), whole.run(given), strict=True):
                    worst.take(got, wanted, in_words(dims) + again)
                    if failed is None and not close(got, wanted, atol, rtol):
                        failed = given
    outputs = tuple(worst.error() for worst in errors)
    largest = max(outputs, key=lambda error: error.max_abs)
    parting = ""
    if failed is not None:
        try:
            with _as_it_was(model, shards):
                parting = where_they_part(shards, model, args, whole.kwargs, dynamic_shapes, failed, atol, rtol)
        except ExportError as error:
            parting = f"where they part can't be told: {error}"
    where = f"output '{largest.name}' with {largest.where}"
    return VerifyResult(largest.max_abs, where, failed is None, tuple(found), outputs, parting)


@contextmanager
def _as_it_was(model: nn.Module, shards: Shards) -> Iterator[None]:
    """Steps in it begin with the buffers as exported; the model's own are put back."""
    shards.reset()
    with restoring(model, shards.state):
        yield
