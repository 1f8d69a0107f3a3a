"""Values of instances ↔ frames between the Worker and its stage processes: what both sides share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardserve.errors import ShardserveError, shortened, text_of
from shardserve.wire.frames import Buffer, Payload, split
from shardserve.wire.messages import stages
from shardserve.wire.tensors import decode, encode

Encoded = tuple[stages.Values, list[Buffer]]


def encode_values(values: Sequence[Any], where: str) -> Encoded:
    """One instance's values; InvalidInput, naming `where` and the position, for what can't be sent."""
    pairs = [encode(value, f"{where} {i}") for i, value in enumerate(values)]
    return tuple(meta for meta, _ in pairs), [buffer for _, buffer in pairs]


def as_results(outcomes: Sequence[Encoded | ShardserveError]) -> tuple[list[stages.Result], list[Buffer]]:
    """The results of a frame and its payload. Errors have MAX_TEXT characters and a word on the rest."""
    results: list[stages.Result] = []
    buffers: list[Buffer] = []
    for outcome in outcomes:
        if isinstance(outcome, ShardserveError):
            results.append(stages.Failure(type(outcome).__name__, shortened(text_of(outcome))))
        else:
            metas, parts = outcome
            results.append(stages.Outputs(metas))
            buffers += parts
    return results, buffers


def decode_values(instances: Sequence[stages.Values], payload: Payload) -> list[tuple[Any, ...]]:
    """Each instance's values, views of the payload; FrameError if it has another size."""
    parts = iter(split(payload, [meta.nbytes for metas in instances for meta in metas]))
    return [tuple(decode(meta, next(parts)) for meta in metas) for metas in instances]


def decode_results(results: Sequence[stages.Result], payload: Payload) -> list[tuple[Any, ...] | stages.Failure]:
    """Each instance's values, or why it has none."""
    values = iter(decode_values([result.values for result in results if isinstance(result, stages.Outputs)], payload))
    return [result if isinstance(result, stages.Failure) else next(values) for result in results]
