"""`verify`: reads the shards back from disk, runs them all, and compares with the unsharded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardserve.errors import ExportError, ShardserveError
from shardserve.export.sources.names import named
from shardserve.export.verification.compare import OutputError, Worst, close
from shardserve.export.verification.parting import where_they_part
from shardserve.export.verification.running import Shards
from shardserve.export.verification.sizes import cases, in_words, inputs_of
from shardserve.export.verification.unsharded import Unsharded, raised, restoring
from shardserve.progress import Progress, quietly


@dataclass(frozen=True)
class VerifyResult:
    """`max_abs_error` over all outputs and `sizes`; `worst`: where it was; `passed`: within tolerance everywhere, and
    each output was compared; else `parting`, a sentence on the first pipeline stage whose values aren't the unsharded
    model's, or `uncompared`, one on each output that is nan or infinite in all elements at all sizes. `notes`: what
    else could not be compared, and why.
    """

    max_abs_error: float
    worst: str
    passed: bool
    sizes: tuple[Mapping[str, int], ...]
    outputs: tuple[OutputError, ...] = ()
    parting: str = ""
    notes: tuple[str, ...] = ()
    uncompared: tuple[str, ...] = ()


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
    InvalidInput for inputs that the model doesn't take, ExportError if the model itself raises with the example; other
    sizes at which it does are `notes`. A model that changes its buffers does two steps of each size, and gets its
    buffers back.
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
    compared: list[Mapping[str, int]] = []
    raising: list[str] = []
    found = cases(shards.signature, example)
    for done, dims in enumerate(found):
        progress("comparing sizes", done, len(found))
        given = inputs_of(shards.signature, example, dims, generator) if done else example
        with _as_it_was(model, shards):
            for again in ("", " in a second step")[: 2 if shards.state else 1]:
                where = in_words(dims) + again
                try:
                    expected = whole.run(given)
                except Exception as error:  # the model's own code raises whatever it likes
                    raising.append(raised(where, error))
                    if not compared:
                        raise ExportError(raising[0]) from error
                    break
                compared += [] if again else [dims]
                for worst, got, wanted in zip(errors, _run(shards, given, where), expected, strict=True):
                    worst.take(got, wanted, where)
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
    without, notes = uncompared({f"output '{worst.name}'": worst for worst in errors}, model)
    return VerifyResult(
        max_abs_error=largest.max_abs,
        worst=f"output '{largest.name}' with {largest.where}",
        passed=failed is None and not without,
        sizes=tuple(compared),
        outputs=outputs,
        parting=parting,
        notes=(*raising, *notes),
        uncompared=without,
    )


def uncompared(outputs: Mapping[str, Worst], model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A sentence on each output, by what it is called, that never had a finite value; notes on where others are NaN,
    and on what of the model is.
    """
    without = {what: worst.uncompared for what, worst in outputs.items() if worst.uncompared}
    nans = {what: worst.nans for what, worst in outputs.items() if worst.nans}
    notes = [
        f"{what} is nan in {where}, which says nothing of the shards"
        for what, where in nans.items()
        if what not in without
    ]
    if nans:
        tensors = (*model.named_parameters(), *model.named_buffers())
        ill = [name for name, tensor in tensors if bool((tensor != tensor).any())]
        notes += [f"the model holds nan itself: {named(ill)}"] if ill else []
    return tuple(f"{what} is {kind} everywhere: nothing was compared" for what, kind in without.items()), tuple(notes)


def _run(shards: Shards, given: Mapping[str, Tensor], where: str) -> list[Tensor]:
    """The outputs of the shards, of inputs that the model takes."""
    try:
        return shards.run(given)
    except ShardserveError:
        raise
    except Exception as error:  # operators raise whatever they like
        text = " ".join(str(error).split())
        raise ExportError(
            f"with {where} the shards raise, and the model doesn't: {type(error).__name__}: {text}"
        ) from error


@contextmanager
def _as_it_was(model: nn.Module, shards: Shards) -> Iterator[None]:
    """Steps in it begin with the buffers as exported; the model's own are put back."""
    shards.reset()
    with restoring(model, shards.state):
        yield
