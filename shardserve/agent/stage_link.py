"""Links between pipeline stages: frames of ours, one connection per pair and generation, ended by closing it.

A thread of its own sends and one receives, so that both overlap with compute. What is under way is bounded by the
Worker's window of steps; a frame carries no metadata, its shapes follow from the step's header.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.tensors import buffers_of
from shardserve.settings import Settings
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import Allocate, FrameError, NoMemory, Payload
from shardserve.wire.messages import group
from shardserve.wire.security import JOIN_LIMIT, Admission, Handshake, Security, perform_handshake
from shardserve.wire.sockets import Address, connect, same_user, tune
from shardserve.wire.tls import TLSSocket

logger = logging.getLogger(__name__)

Frames = FrameSocket[group.StageHello | group.Transfer]
PURPOSE = "stage link"
DEFAULTS = Settings()
OPEN = Security()


class LinkBroken(Exception):
    """The other side closed the link, or is at another step, while the generation lives."""


class OutgoingLink:
    """To the next pipeline stage. `on_failure` is called once, by the sending thread, if it can't go on."""

    def __init__(
        self,
        address: Address,
        rank: int,
        lifetime: Lifetime,
        timeout: float,
        on_failure: Callable[[str], None],
        settings: Settings = DEFAULTS,
        security: Security = OPEN,
    ) -> None:
        self._lifetime = lifetime
        self._on_failure = on_failure
        connection = connect(address, timeout, settings.peer_timeout, security.local_only)
        # So that the end of the generation ends this, too; the connection itself may not stand yet.
        lifetime.on_end(lambda: shut(connection))
        try:
            entered = perform_handshake(connection, Admission(security, PURPOSE, settings.join_timeout, address))
        except OSError:
            if lifetime.ended:
                raise GenerationEnded from None
            raise
        self._frames: Frames = FrameSocket(entered, group.OnStageLink, share=True)
        self._queue: queue.SimpleQueue[tuple[int, Sequence[Tensor]] | None] = queue.SimpleQueue()
        lifetime.on_end(self.abort)
        self._frames.send(group.StageHello(lifetime.generation, rank))
        threading.Thread(target=self._work, name="stage-send", daemon=True).start()

    def send(self, step: int, tensors: Sequence[Tensor]) -> None:
        self._queue.put((step, tensors))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, tensors = item
            try:
                self._frames.take_acceptance()
                self._frames.send(group.Transfer(self._lifetime.generation, step), buffers_of(tensors))
            except Exception as error:  # noqa: BLE001
                # Also what a device raises while the tensors are copied from it; the next stage would wait for ever.
                if not self._lifetime.ended:
                    logger.warning("the link to the next pipeline stage broke: %r", error)
                    self._on_failure(f"the link to the next pipeline stage broke: {error}")
                return
            # The next step may be long in coming, and these tensors may lie in another process's memory, which waits
            # for them.
            del item, tensors

    def abort(self) -> None:
        self._queue.put(None)
        self._frames.close()


class IncomingLink:
    """From the previous pipeline stage, taken on this agent's listeners. allocate: as in FrameReader."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        lifetime: Lifetime,
        timeout: float,
        settings: Settings = DEFAULTS,
        security: Security = OPEN,
        allocate: Allocate | None = None,
    ) -> None:
        self._lifetime = lifetime
        self._queue: queue.SimpleQueue[tuple[int, Payload | NoMemory, float] | str | None] = queue.SimpleQueue()
        # When what `receive` gave last was here, on CLOCK_MONOTONIC.
        self.arrived = 0.0
        self._frames = _accept(listeners, lifetime, timeout, settings, security, allocate)
        lifetime.on_end(self.abort)
        threading.Thread(target=self._work, name="stage-receive", daemon=True).start()

    def receive(self, step: int) -> Payload | NoMemory:
        item = self._queue.get()
        if self._lifetime.ended or item is None:
            raise GenerationEnded
        if isinstance(item, str):
            raise LinkBroken(f"the link from the previous pipeline stage broke: {item}")
        number, payload, self.arrived = item
        if number != step:
            raise LinkBroken(f"the previous pipeline stage is at step {number}, this one at {step}")
        return payload

    def _work(self) -> None:
        try:
            while True:
                payload: Payload | NoMemory
                try:
                    message, payload = self._frames.receive()
                except NoMemory as error:
                    message, payload = error.message, error
                # A generation has a connection of its own: whatever comes on it is of this one.
                assert isinstance(message, group.Transfer)
                self._queue.put((message.step, payload, time.monotonic()))
                # While it has a name here, its sender can't use the memory again.
                del payload
        except (OSError, EOFError, FrameError) as error:
            self._queue.put(str(error))

    def abort(self) -> None:
        self._queue.put(None)
        self._frames.close()


def _accept(
    listeners: Sequence[socket.socket],
    lifetime: Lifetime,
    timeout: float,
    settings: Settings,
    security: Security,
    allocate: Allocate | None,
) -> Frames:
    """The connection whose hello is of this generation; others are closed, who says nothing keeps nobody out."""
    deadline = time.monotonic() + timeout
    admission = Admission(security, PURPOSE, settings.join_timeout)
    wake, waker = socket.socketpair()
    lifetime.on_end(waker.close)
    # In the order in which they came.
    newcomers: dict[Newcomer, None] = {}
    with contextlib.ExitStack() as leaving:
        leaving.callback(_close_all, newcomers)
        leaving.enter_context(wake)
        selector = leaving.enter_context(selectors.DefaultSelector())
        for source in (wake, *listeners):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if lifetime.ended:
                raise GenerationEnded
            if not ready:
                raise LinkBroken(f"the previous pipeline stage did not connect within {timeout} s")
            for key, _ in ready:
                newcomer: Newcomer | None = key.data
                if newcomer is None:
                    assert isinstance(key.fileobj, socket.socket)
                    if len(newcomers) >= settings.max_joining:
                        _dismiss(next(iter(newcomers)), newcomers, selector)
                    newcomer = Newcomer(key.fileobj.accept()[0], admission, settings.peer_timeout, allocate)
                    newcomers[newcomer] = None
                    selector.register(newcomer.connection, selectors.EVENT_READ, newcomer)
                elif newcomer in newcomers:
                    hello = newcomer.progress()
                    if hello is None and not newcomer.gone:
                        continue
                    if hello is not None and hello.generation == lifetime.generation:
                        del newcomers[newcomer]
                        return newcomer.taken()
                    _dismiss(newcomer, newcomers, selector)


def _close_all(newcomers: dict[Newcomer, None]) -> None:
    for newcomer in newcomers:
        newcomer.close()


def _dismiss(newcomer: Newcomer, newcomers: dict[Newcomer, None], selector: selectors.BaseSelector) -> None:
    selector.unregister(newcomer.connection)
    del newcomers[newcomer]
    newcomer.close()


class Newcomer:
    """A connection that hasn't said yet who it is; nobody waits for it. `gone` when it can be closed."""

    def __init__(
        self, connection: socket.socket, admission: Admission, peer_timeout: float, allocate: Allocate | None = None
    ) -> None:
        self.connection = connection
        self._allocate = allocate
        self.gone = connection.family == socket.AF_UNIX and not same_user(connection)
        connection.setblocking(False)
        tune(connection, peer_timeout)
        self._handshake = admission.handshake(connection)
        self._frames: Frames | None = None
        if self._handshake is None:
            self._frames = self._framed(connection)

    def progress(self) -> group.StageHello | None:
        """Takes what is there; the hello when it is complete."""
        if self.gone:
            return None
        try:
            if self._handshake is not None:
                self._enter(self._handshake)
            if self._frames is not None:
                message, _ = self._frames.receive()
                self.gone = not isinstance(message, group.StageHello)
                return message if isinstance(message, group.StageHello) else None
        except BlockingIOError:
            pass
        except (OSError, EOFError, FrameError):
            self.gone = True
        return None

    def _enter(self, handshake: Handshake) -> None:
        data = self.connection.recv(JOIN_LIMIT)
        if not data:
            raise EOFError
        # A few hundred bytes on a new connection: the kernel takes them.
        self.connection.send(handshake.received(memoryview(data)))
        if handshake.refused is not None:
            logger.warning("stage link: refused %s", handshake.refused)
            self.gone = True
        elif handshake.done:
            self._handshake = None
            tls = handshake.tls
            self._frames = self._framed(self.connection if tls is None else TLSSocket(self.connection, tls))

    def _framed(self, connection: socket.socket | TLSSocket) -> Frames:
        return FrameSocket(connection, group.OnStageLink, share=True, allocate=self._allocate)

    def taken(self) -> Frames:
        assert self._frames is not None
        self._frames.set_timeout(None)
        return self._frames

    def close(self) -> None:
        shut(self.connection)
        self.connection.close()


def shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
