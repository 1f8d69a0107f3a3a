"""What every request of Main has in common: how its inputs are read, and how it is answered."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from shardserve.errors import InternalError, InvalidInput, ShardserveError
from shardserve.servable import Method
from shardserve.wire.frames import Buffer, Payload
from shardserve.wire.messages import front
from shardserve.wire.stream import FrameStream
from shardserve.wire.tensors import decode_instance, encode_instance

logger = logging.getLogger(__name__)

MainStream = FrameStream[front.ToWorker]


def decode_inputs(method: Method, metas: front.Instance, parts: list[Payload], where: str) -> list[Any]:
    """The values of the method's inputs, in its order. InvalidInput if one is missing or can't be read."""
    given = decode_instance(metas, parts, where)
    for name in method.inputs:
        if name not in given:
            raise InvalidInput(f"{where}: input {name!r} is missing; {method.name} takes {', '.join(method.inputs)}")
    return [given[name] for name in method.inputs]


def reply(stream: MainStream, message: front.Infer, results: Sequence[dict[str, Any] | ShardserveError]) -> None:
    """Sends the instances' outcomes; an error among them is its instance's own (`in_reply`)."""
    outcomes: list[front.InstanceOutputs | front.InstanceError] = []
    buffers: list[Buffer] = []
    for i, result in enumerate(results):
        if isinstance(result, ShardserveError):
            assert result.in_reply
            outcomes.append(front.InstanceError(type(result).__name__, str(result)))
        else:
            metas, parts = encode_instance(result, f"instance {i}")
            outcomes.append(front.InstanceOutputs(metas))
            buffers += parts
    stream.send(front.Reply(message.request, outcomes), buffers)


def refuse(stream: MainStream, message: front.Infer, error: ShardserveError) -> None:
    """The answer to the whole request."""
    stream.send(front.Failed(message.request, type(error).__name__, str(error)))


@contextlib.contextmanager
def errors_answered(stream: MainStream, message: front.Infer) -> Iterator[None]:
    """An error within it is the answer to the whole request; a bug is logged, and not told."""
    try:
        yield
    except ShardserveError as error:
        refuse(stream, message, error)
    except Exception:
        logger.exception("request of method %r failed", message.method)
        refuse(stream, message, InternalError("an internal error; the server's log has more"))
