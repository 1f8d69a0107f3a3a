"""Instances ↔ PredictRequest and PredictReply, and what becomes of errors: shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import grpc

from shardserve.errors import (
    CLASSES,
    ConfigError,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    NotFound,
    Overloaded,
    ShardserveError,
    StepError,
    Unavailable,
)
from shardserve.wire import proto, tensors
from shardserve.wire.stubs import ms_service_pb2 as pb

Instance = Mapping[str, tensors.Value]
Reply = list[dict[str, Any]] | dict[str, str]
"""One dict per instance, `{"error": message}` for one that failed; or that dict alone for the whole request."""

_BY_STATUS: dict[str, type[ShardserveError]] = {
    error.grpc_status: error for error in CLASSES.values() if not error.__subclasses__() and not error.in_reply
} | {"INTERNAL": InternalError}
_BY_CODE: dict[int, type[ShardserveError]] = {
    1: StepError,
    2: InvalidInput,
    3: InternalError,
    4: Unavailable,
    5: NotFound,
}


# A uint64 in the protocol.
MAX_VERSION = (1 << 64) - 1


class InvalidReply(Exception):
    """The server sent what can't be an answer."""


def servable_spec(name: str, method: str, version: int) -> pb.ServableSpec:
    """ConfigError for what can't be a name or a version."""
    for what, text in (("servable_name", name), ("method_name", method)):
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{what}={text!r} is not a name")
    if not isinstance(version, Integral) or isinstance(version, bool) or not 0 <= version <= MAX_VERSION:
        raise ConfigError(f"version_number={version!r} is not an integer from 0 (the latest) to {MAX_VERSION}")
    try:
        return pb.ServableSpec(name=name, method_name=method, version_number=int(version))
    except ValueError as error:
        raise ConfigError(f"servable_name={name!r}, method_name={method!r}: {error}") from None


def encode_request(spec: pb.ServableSpec, instances: Instance | Sequence[Instance]) -> pb.PredictRequest:
    """InvalidInput names the instance and the input that can't be sent; MessageTooLarge: they are too many bytes."""
    request = pb.PredictRequest(servable_spec=spec)
    if isinstance(instances, Mapping):
        instances = [instances]
    if not isinstance(instances, Sequence) or isinstance(instances, str | bytes):
        raise InvalidInput(f"instances is a dict or a list of dicts, got {type(instances).__name__}")
    size = 0
    for index, values in enumerate(instances):
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise InvalidInput(f"instance {index} isn't a dict with names of inputs as keys")
        metas, buffers = tensors.encode_instance(values, f"instance {index}")
        size += proto.size_of(metas)
        if size > proto.MAX_MESSAGE:
            raise MessageTooLarge(
                f"the first {index + 1} of {len(instances)} instances have {size} bytes; a message has at most "
                f"{proto.MAX_MESSAGE}"
            )
        try:
            proto.to_instance(request.instances.add(), metas, buffers)
        except UnicodeEncodeError:
            raise InvalidInput(f"instance {index}: a name that can't be UTF-8 in {list(values)}") from None
    return request


def decode_reply(reply: pb.PredictReply, raise_errors: bool) -> Reply:
    """Outputs are arrays that the caller may write to.

    With `raise_errors` the first error of an instance or of the request is raised, as its class of shardserve.errors.
    """
    try:
        return _results(reply, raise_errors)
    except InvalidReply as error:
        return failed(InternalError(f"the server's reply is none: {error}"), raise_errors)


def _results(reply: pb.PredictReply, raise_errors: bool) -> Reply:
    codes = [entry.error_code for entry in reply.error_msg]
    if len(codes) == 1 and not reply.instances:
        return failed(_error(reply.error_msg[0]), raise_errors)
    if codes and len(codes) != len(reply.instances):
        raise InvalidReply(f"{len(codes)} errors for {len(reply.instances)} instances")
    outputs: list[dict[str, Any]] = []
    for index, instance in enumerate(reply.instances):
        if codes and codes[index]:
            error = _error(reply.error_msg[index])
            if raise_errors:
                raise error
            outputs.append({"error": str(error)})
        else:
            outputs.append(_outputs(instance, f"instance {index}"))
    return outputs


def _outputs(instance: pb.Instance, where: str) -> dict[str, Any]:
    try:
        metas, buffers = proto.from_instance(instance, where)
        values = tensors.decode_instance(metas, [bytearray(data) for data in buffers], where)
    except InvalidInput as error:
        raise InvalidReply(str(error)) from None
    # A protobuf map has no order of its own.
    return dict(sorted(values.items()))


def first_error(reply: pb.PredictReply) -> ShardserveError | None:
    """Of the instances, or of the request as a whole; None if all is well. Looks at nothing else of the reply."""
    return next((_error(entry) for entry in reply.error_msg if entry.error_code), None)


def failed(error: ShardserveError, raise_errors: bool) -> Reply:
    """What a request that failed as a whole gives."""
    if raise_errors:
        raise error
    return {"error": str(error)}


def from_status(
    code: grpc.StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> ShardserveError:
    """The error behind a gRPC status: the class that the server names, or the status's own."""
    error = CLASSES.get(str(dict(trailers or ()).get("shardserve-error", "")))
    if error is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC's own words, of a message over the limit or of too many calls at once.
        error = MessageTooLarge if "larger than max" in (details or "") else Overloaded
        if error is MessageTooLarge:
            details = f"{details}: the server's max_msg_mb_size is the limit"
        elif "Concurrent RPC limit" in (details or ""):
            details = f"{details}: the server's max_calls is the limit"
    elif error is None and code is grpc.StatusCode.CANCELLED and details == "CANCELLED":
        # By the server: of calls that this side gives up the words are others.
        error, details = Unavailable, "the server ended the call, as one that stops does with what has just come"
    elif error is None and "failed to connect" in (details or ""):
        details = f"{details}{_tls_hint(str(details))}"
    error = error or _BY_STATUS.get(code.name, InternalError)
    return error(f"{code.name}: {details or 'no details'}")


def _tls_hint(details: str) -> str:
    if details.endswith("Socket closed"):
        return ": does the server want TLS (ssl_config)?"
    return ": the server speaks no TLS" if "WRONG_VERSION_NUMBER" in details else ""


def cancelled() -> ShardserveError:
    """Of a call that this side gave up."""
    return from_status(grpc.StatusCode.CANCELLED, "cancelled", None)


def from_rpc(error: Any) -> ShardserveError:
    """The same for the exception of a call, which grpc types as less than it is."""
    return from_status(error.code(), error.details(), error.trailing_metadata())


def _error(entry: pb.ErrorMsg) -> ShardserveError:
    return _BY_CODE.get(entry.error_code, InternalError)(entry.error_msg.decode(errors="replace"))
