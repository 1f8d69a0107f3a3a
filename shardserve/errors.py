"""Every error that shardserve raises, each with the codes it carries over gRPC, REST and MindSpore's protocol.

ShardserveError
├── RequestError                    the client is at fault
│   ├── InvalidInput                an input is missing, or has a wrong dtype, shape or value
│   ├── NotFound                    no such servable, version or method
│   └── MessageTooLarge             the request is larger than the server takes
├── ServableError                   the operator or the author of the servable is at fault
│   ├── ConfigError                 an argument, a servable_config.py or a file that is wrong
│   │   ├── RankTableError          a field of the rank table
│   │   ├── ShardError              a file of a shard, or shards that don't belong together
│   │   └── ExportError             a model, plan or cut that can't be exported
│   ├── JoinRefused                 an agent that the Worker doesn't take
│   └── StartError                  a process that didn't start: a port in use, agents that didn't come
└── ServiceError                    the service can't answer now
    ├── StepError                   the model raised on this request's input
    ├── StageError                  a Python stage raised on it, died, or gave what isn't a result
    ├── Unavailable                 the servable isn't ready, or the server is stopping
    ├── Overloaded                  a bounded queue is full, or there is no memory for this request
    ├── DeadlineExceeded            the deadline passed: says what was waited for, where, how long
    ├── Aborted                     generations ended each time that the request ran, or it held state that was lost
    └── InternalError               a bug in shardserve

A class has one gRPC status, one HTTP status and one MindSpore Serving error code. `in_reply` says which channel
gRPC uses: true, status OK with an ErrorMsg in the reply (what MindSpore Serving clients expect); false, the gRPC
status and no reply.
"""

from __future__ import annotations

from typing import ClassVar

MAX_TEXT = 4000
"""Characters of an error's text that a servable's own code made: a model or Python stage may raise with any length."""

MAX_NAME = 200
"""Characters of a name in an error's text."""


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """The text, cut off after `limit` characters with a word on how many were left out; UTF-8 can write it: a lone
    surrogate, as os.listdir has for bytes that are none, becomes `\\udce9`."""
    left_out = len(text) - limit
    text = text[:limit].encode("utf-8", "backslashreplace").decode()
    return text if left_out <= 0 else f"{text}… ({left_out} more characters left out)"


def shown(name: str) -> str:
    """The name in quotes, as far as it is one that somebody might have given: a request's may be of any length."""
    return repr(name if len(name) <= MAX_NAME else shortened(name, MAX_NAME))


def text_of(error: BaseException) -> str:
    """str(error), or a word on why there is none: an exception's class may be anybody's."""
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001 -- whatever it is, it is told
        return f"(its text can't be made: {type(failure).__name__})"


def described(error: BaseException) -> str:
    """Class and text."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ShardserveError(Exception):
    """Root of all errors; `str(error)` is the text that a client may see."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    mindspore_code: ClassVar[int] = 3
    in_reply: ClassVar[bool] = False


class RequestError(ShardserveError):
    grpc_status, http_status, mindspore_code, in_reply = "INVALID_ARGUMENT", 400, 2, True


class InvalidInput(RequestError):
    pass


class NotFound(RequestError):
    grpc_status, http_status, mindspore_code = "NOT_FOUND", 404, 5


class MessageTooLarge(RequestError):
    grpc_status, http_status, in_reply = "RESOURCE_EXHAUSTED", 413, False


class ServableError(ShardserveError):
    grpc_status = "FAILED_PRECONDITION"


class ConfigError(ServableError):
    pass


class RankTableError(ConfigError):
    pass


class ShardError(ConfigError):
    pass


class ExportError(ConfigError):
    pass


class JoinRefused(ServableError):
    grpc_status, http_status = "PERMISSION_DENIED", 403


class StartError(ServableError):
    pass


class ServiceError(ShardserveError):
    pass


class StepError(ServiceError):
    mindspore_code, in_reply = 1, True


class StageError(ServiceError):
    mindspore_code, in_reply = 1, True


class Unavailable(ServiceError):
    grpc_status, http_status, mindspore_code = "UNAVAILABLE", 503, 4


class Overloaded(ServiceError):
    grpc_status, http_status, mindspore_code = "RESOURCE_EXHAUSTED", 429, 4


class DeadlineExceeded(ServiceError):
    grpc_status, http_status, mindspore_code = "DEADLINE_EXCEEDED", 504, 1


class Aborted(ServiceError):
    grpc_status, http_status, mindspore_code = "ABORTED", 503, 1


class InternalError(ServiceError):
    pass


def _classes(root: type[ShardserveError]) -> dict[str, type[ShardserveError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_classes(child))
    return found


CLASSES: dict[str, type[ShardserveError]] = _classes(ShardserveError)


def from_wire(name: str, message: str) -> ShardserveError:
    """The error that another process named `name`; an unknown name is an InternalError."""
    return CLASSES.get(name, InternalError)(message)
