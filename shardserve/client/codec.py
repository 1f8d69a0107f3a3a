"""Instances ↔ PredictRequest and PredictReply, and what becomes of errors: shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc

from shardserve.errors import (
    CLASSES,
    ConfigError,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    NotFound,
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
} | {"INTERNAL": InternalError, "RESOURCE_EXHAUSTED": MessageTooLarge}
_BY_CODE: dict[int, type[ShardserveError]] = {
    1: StepError,
    2: InvalidInput,
    3: InternalError,
    4: Unavailable,
    5: NotFound,
}


def servable_spec(name: str, method: str, version: int) -> pb.ServableSpec:
    """ConfigError for what can't be a name or a version."""
    try:
        return pb.ServableSpec(name=name, method_name=method, version_number=version)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"servable {name!r}, method {method!r}, version {version!r}: {error}") from None


def encode_request(spec: pb.ServableSpec, instances: Instance | Sequence[Instance]) -> pb.PredictRequest:
    """InvalidInput names the instance and the input that can't be sent."""
    request = pb.PredictRequest(servable_spec=spec)
    if isinstance(instances, Mapping):
        instances = [instances]
    if not isinstance(instances, Sequence) or isinstance(instances, str | bytes):
        raise InvalidInput(f"instances is a dict or a list of dicts, got {type(instances).__name__}")
    for index, values in enumerate(instances):
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise InvalidInput(f"instance {index} isn't a dict with names of inputs as keys")
        metas, buffers = tensors.encode_instance(values, f"instance {index}")
        proto.to_instance(request.instances.add(), metas, buffers)
    return request


def decode_reply(reply: pb.PredictReply, raise_errors: bool) -> Reply:
    """Outputs are arrays that the caller may write to.

    With `raise_errors` the first error of an instance or of the request is raised, as its class of shardserve.errors.
    """
    codes = [entry.error_code for entry in reply.error_msg]
    if len(codes) == 1 and not reply.instances:
        return failed(_error(reply.error_msg[0]), raise_errors)
    if codes and len(codes) != len(reply.instances):
        raise InternalError(f"the server sent {len(codes)} errors for {len(reply.instances)} instances")
    outputs: list[dict[str, Any]] = []
    for index, instance in enumerate(reply.instances):
        if codes and codes[index]:
            error = _error(reply.error_msg[index])
            if raise_errors:
                raise error
            outputs.append({"error": str(error)})
        else:
            metas, buffers = proto.from_instance(instance, f"instance {index}")
            values = tensors.decode_instance(metas, [bytearray(data) for data in buffers], f"instance {index}")
            # A protobuf map has no order of its own.
            outputs.append(dict(sorted(values.items())))
    return outputs


def failed(error: ShardserveError, raise_errors: bool) -> Reply:
    """What a request that failed as a whole gives."""
    if raise_errors:
        raise error
    return {"error": str(error)}


def from_status(
    code: grpc.StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> ShardserveError:
    """The error behind a gRPC status: the class that the server names, or the status's own."""
    named = CLASSES.get(str(dict(trailers or ()).get("shardserve-error", "")))
    error = named or _BY_STATUS.get(code.name, InternalError)
    return error(f"{code.name}: {details or 'no details'}")


def from_rpc(error: Any) -> ShardserveError:
    """The same for the exception of a call, which grpc types as less than it is."""
    return from_status(error.code(), error.details(), error.trailing_metadata())


def _error(entry: pb.ErrorMsg) -> ShardserveError:
    return _BY_CODE.get(entry.error_code, InternalError)(entry.error_msg.decode(errors="replace"))
