"""Main and the process that reads and writes its large JSON bodies, over the socketpair that the process inherits.

Main's requests are answered in their order, each by `Read`, `Written` or `Refused` with its number. The end of the
connection ends the process.
"""

from __future__ import annotations

from shardserve.wire.messages import Message
from shardserve.wire.messages.front import Instance, InstanceError, InstanceOutputs


class Read(Message, frozen=True):
    """The instances of a body: of each its tensors, or what is wrong with it. Payload as in `front.Infer`."""

    request: int
    instances: list[Instance | InstanceError]


class Written(Message, frozen=True):
    """Payload: `nbytes` of JSON."""

    request: int
    nbytes: int


class Refused(Message, frozen=True):
    """What is wrong with the body as a whole. error: a class name of shardserve.errors."""

    request: int
    error: str
    message: str


class ReadBody(Message, frozen=True):
    """Payload: the body in pieces of these sizes. dtypes: what JSON numbers become, by input."""

    request: int
    pieces: list[int]
    dtypes: dict[str, str]
    max_instances: int


class WriteBody(Message, frozen=True):
    """Payload as in `front.Reply`."""

    request: int
    results: list[InstanceOutputs | InstanceError]


ToProcess = ReadBody | WriteBody
ToMain = Read | Written | Refused
