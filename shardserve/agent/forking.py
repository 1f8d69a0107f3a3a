"""What the supervisor, its fork server and the agents say to each other.

The supervisor asks its fork server over a socketpair, one request at a time. An agent tells the supervisor over a pipe
how far it has loaded its weights, and in the end why it leaves.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import msgspec

from shardserve.wire.messages.launch import SecurityFiles

MESSAGE_LIMIT = 1 << 20
"""Bytes of a message."""


class ForkRequest(msgspec.Struct, frozen=True, tag="fork"):
    """All that an agent needs to know; the descriptor of its group's shared memory travels beside it.

    host: the address by which other ranks reach it. stage_port: where it listens for the link of the previous pipeline
    stage. threads: for torch's operators. security: files that each agent reads for itself. supervisor: the asking
    one's name. servable: with its version, as lines of the log begin.
    """

    rank: int
    host: str
    device: str
    worker_address: str
    stage_port: int
    threads: int
    model_files: tuple[str, ...]
    config_files: tuple[str | None, ...]
    security: SecurityFiles = SecurityFiles()
    supervisor: str = ""
    servable: str = ""


class ForkReply(msgspec.Struct, frozen=True):
    """pid of the child; its pidfd and the reading end of what it says are attached. error: why there is none."""

    pid: int
    error: str = ""


ATTACHED = 2


class EndingRequest(msgspec.Struct, frozen=True, tag="ending"):
    """How a process ended, which only its parent is told. Each may be asked for once."""

    pid: int


class EndingReply(msgspec.Struct, frozen=True):
    """code: its exit code, or minus the signal that ended it; None if this fork server knows of no such end."""

    code: int | None


ToForkServer = ForkRequest | EndingRequest

# A pipe holds 64 KiB that nobody may have read before the death, so longer ones would keep the agent alive.
LAST_WORDS_LENGTH = 4000


class LastWords(msgspec.Struct, frozen=True, tag="last"):
    """Why an agent ended of its own will. error: a class name of shardserve.errors, or nothing if it left in order."""

    error: str
    message: str

    def write(self, pipe: int) -> None:
        """Says them, as far as they fit."""
        _say(pipe, LastWords(self.error, self.message[:LAST_WORDS_LENGTH]))


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How many bytes of its weights an agent has loaded, and of how many that it knows of."""

    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """An agent has its shard, and goes to the Worker."""


Said: Any = LastWords | Loading | Loaded


class LoadingTeller:
    """Says on an agent's pipe what it has loaded, each percent once: all of it fits into the pipe, read or not."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._said: tuple[int, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = 100 * done // max(total, 1), total
        if now != self._said:
            self._said = now
            _say(self._pipe, Loading(done, total))

    def loaded(self) -> None:
        _say(self._pipe, Loaded())


def _say(pipe: int, message: LastWords | Loading | Loaded) -> None:
    # Nobody listens any more where the supervisor has ended, and this agent is about to.
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, msgspec.json.encode(message) + b"\n")
