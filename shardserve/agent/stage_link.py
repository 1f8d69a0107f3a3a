"""Links between pipeline stages: frames of ours, one connection per pair and generation, ended by closing it.

A thread of its own sends and one receives, so that both overlap with compute. What is under way is bounded by the
Worker's window of steps; a frame carries no metadata, its shapes follow from the step's header.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.tensors import buffers_of
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import FrameError, Payload
from shardserve.wire.messages import group
from shardserve.wire.sockets import Address, connect, same_user, tune

Frames = FrameSocket[group.StageHello | group.Transfer]


class Link(Protocol):
    """One direction between two ranks of neighbouring stages, for one generation."""

    def send(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Queues the tensors of a step; they must not change until the step ends."""

    def receive(self, step: int) -> Payload:
        """The payload of this step; GenerationEnded when the generation ends meanwhile."""

    def abort(self) -> None:
        """Ends both at once, from any thread."""


class LinkBroken(Exception):
    """The other side closed the link, or is at another step, while the generation lives."""


class OutgoingLink:
    """To the next pipeline stage."""

    def __init__(self, address: Address, rank: int, lifetime: Lifetime, timeout: float) -> None:
        self._lifetime = lifetime
        self._frames: Frames = FrameSocket(connect(address, timeout), group.OnStageLink)
        self._queue: queue.SimpleQueue[tuple[int, Sequence[Tensor]] | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        lifetime.on_end(self.abort)
        self._frames.send(group.StageHello(lifetime.generation, rank))
        threading.Thread(target=self._work, name="stage-send", daemon=True).start()

    def send(self, step: int, tensors: Sequence[Tensor]) -> None:
        if self._failure is not None and not self._lifetime.ended:
            raise LinkBroken(f"the link to the next pipeline stage broke: {self._failure}")
        self._queue.put((step, tensors))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, tensors = item
            try:
                self._frames.send(group.Transfer(self._lifetime.generation, step), buffers_of(tensors))
            except OSError as error:
                self._failure = error
                return

    def abort(self) -> None:
        self._queue.put(None)
        self._frames.close()


class IncomingLink:
    """From the previous pipeline stage, taken on this agent's listeners."""

    def __init__(self, listeners: Sequence[socket.socket], lifetime: Lifetime, timeout: float) -> None:
        self._lifetime = lifetime
        self._queue: queue.SimpleQueue[tuple[int, Payload] | str | None] = queue.SimpleQueue()
        self._frames = _accept(listeners, lifetime, timeout)
        lifetime.on_end(self.abort)
        threading.Thread(target=self._work, name="stage-receive", daemon=True).start()

    def receive(self, step: int) -> Payload:
        item = self._queue.get()
        if self._lifetime.ended or item is None:
            raise GenerationEnded
        if isinstance(item, str):
            raise LinkBroken(f"the link from the previous pipeline stage broke: {item}")
        number, payload = item
        if number != step:
            raise LinkBroken(f"the previous pipeline stage is at step {number}, this one at {step}")
        return payload

    def _work(self) -> None:
        try:
            while True:
                message, payload = self._frames.receive()
                # A generation has a connection of its own: whatever comes on it is of this one.
                assert isinstance(message, group.Transfer)
                self._queue.put((message.step, payload))
        except (OSError, EOFError, FrameError) as error:
            self._queue.put(str(error))

    def abort(self) -> None:
        self._queue.put(None)
        self._frames.close()


def _accept(listeners: Sequence[socket.socket], lifetime: Lifetime, timeout: float) -> Frames:
    """The connection whose hello is of this generation; others are closed, who says nothing keeps nobody out."""
    deadline = time.monotonic() + timeout
    wake, waker = socket.socketpair()
    lifetime.on_end(waker.close)
    silent: set[Frames] = set()
    try:
        with wake, selectors.DefaultSelector() as selector:
            for source in (wake, *listeners):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if lifetime.ended:
                    raise GenerationEnded
                if not ready:
                    raise LinkBroken(f"the previous pipeline stage did not connect within {timeout} s")
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    frames: Frames | None = key.data
                    if frames is None:
                        connection, _ = key.fileobj.accept()
                        frames = _newcomer(connection)
                        silent.add(frames)
                        selector.register(connection, selectors.EVENT_READ, frames)
                        continue
                    try:
                        message, _ = frames.receive()
                    except BlockingIOError:
                        continue
                    except (OSError, EOFError, FrameError):
                        message = None
                    selector.unregister(key.fileobj)
                    silent.remove(frames)
                    if isinstance(message, group.StageHello) and message.generation == lifetime.generation:
                        frames.set_timeout(None)
                        return frames
                    frames.close()
    finally:
        for frames in silent:
            frames.close()


def _newcomer(connection: socket.socket) -> Frames:
    """Reads without waiting. That of another user of this host is at its end at once."""
    frames: Frames = FrameSocket(connection, group.OnStageLink)
    frames.set_timeout(0)
    if connection.family == socket.AF_UNIX and not same_user(connection):
        connection.shutdown(socket.SHUT_RDWR)
    tune(connection)
    return frames
