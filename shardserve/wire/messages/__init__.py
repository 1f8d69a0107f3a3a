"""The messages of each link, one file a link: `front` (Main, Worker), `group` (Worker, agents, supervisors; agent to
agent), `launch` (launcher, Main, Worker), `stages` (Worker and its processes for Python stages), `bodies` (Main and its
process for large JSON bodies). `times` is what several of them say of recorded steps."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: an array on the wire, its class name in front; decoding checks every field's type."""


class Generation(NamedTuple):
    """One life of a group, totally ordered: `incarnation` counts Workers, `counter` the groups that one formed."""

    incarnation: int
    counter: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.counter}"


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a payload doesn't say of a tensor. dtype: a numpy name, or "str" or "bytes", whose `lengths` are those of
    the elements in bytes, in C order; numbers are little-endian, in C order."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    lengths: tuple[int, ...] | None = None
