"""The Worker's connections: what comes on each, and to whom it goes."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import TYPE_CHECKING

from shardserve.errors import JoinRefused, Overloaded, ShardserveError
from shardserve.wire.frames import FrameError, NoMemory, Payload
from shardserve.wire.messages import front, group
from shardserve.wire.security import peer_in_words
from shardserve.wire.sockets import same_user
from shardserve.wire.stream import FrameStream
from shardserve.worker.group import AgentHandle, ReplicaGroup
from shardserve.worker.registry import HostHandle
from shardserve.worker.replies import refuse
from shardserve.worker.requests import Requests

if TYPE_CHECKING:
    from shardserve.worker.worker import Worker

logger = logging.getLogger(__name__)


class GroupConnection:
    """One connection on the distributed address; its first message says whether a supervisor or an agent has come."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._host: HostHandle | None = None
        self._agent: AgentHandle | None = None
        self._group: ReplicaGroup | None = None
        self._peer = ""
        self._admitted = False
        self.stream: FrameStream[group.FromGroup] = FrameStream(
            group.FromGroup,
            self._frame,
            self._lost,
            on_made=self._made,
            admission=worker.admission,
            on_admitted=self._came_in,
            share=True,
            relay=True,
            on_no_memory=self._no_memory,
        )

    def _made(self, connection: socket.socket) -> bool:
        if not _may_connect(connection):
            return False
        self._peer = peer_in_words(connection)
        self._worker.came(self.stream, connection)
        return True

    def _came_in(self) -> None:
        self._admitted = True
        self._worker.admitted(self.stream)

    def _frame(self, message: group.FromGroup, payload: Payload) -> None:
        if self._agent is not None and self._group is not None:
            if isinstance(message, group.Clock | group.Times):
                self._worker.inquiries.answered(self._group, self._agent, message)
            else:
                self._group.handle(self._agent, message, payload)
            return
        try:
            match message:
                case group.Join():
                    raise JoinRefused(
                        "this Worker was given no join secret; whoever comes with one is at the wrong one"
                    )
                case group.Introduce() if self._host is None:
                    self._host = self._worker.introduced(self.stream, message)
                case group.Enlist() if self._host is not None:
                    self._worker.enlist(self._host, message)
                case group.GaveUp() if self._host is not None:
                    self._worker.gave_up(message)
                case group.Register() if self._host is None:
                    self._group, self._agent = self._worker.register(self.stream, message)
                case _:
                    raise FrameError(f"{type(message).__name__} came out of turn")
        except ShardserveError as error:
            # No warning for an agent: its supervisor hears from it why it was refused, and tells the Worker if it gives
            # it up.
            level = logging.INFO if isinstance(message, group.Register) else self._worker.complaints
            logger.log(level, "refused: %s", error)
            self.stream.send(group.Refuse(type(error).__name__, str(error)))
            self.stream.close()

    def _no_memory(self, message: group.FromGroup, error: NoMemory) -> None:
        if self._agent is None or self._group is None:
            raise error
        self._group.handle(self._agent, message, error)

    @property
    def _who(self) -> str:
        if self._agent is not None:
            return f"rank {self._agent.rank} (pid {self._agent.pid}, {self._peer})"
        if self._host is not None:
            ranks = f" of ranks {', '.join(map(str, self._host.ranks))}" if self._host.ranks else ""
            return f"the supervisor{ranks} (pid {self._host.pid}, {self._peer})"
        return self._peer if self._admitted else f"{self._peer}, which was not admitted yet"

    def _lost(self, reason: Exception | None) -> None:
        if isinstance(reason, JoinRefused) or (isinstance(reason, TimeoutError) and reason.errno is None):
            # The join failed, or took too long; both texts say whose.
            logger.warning("refused %s", reason)
        elif isinstance(reason, FrameError):
            logger.warning("a connection on the distributed address ends: %s", reason)
        elif isinstance(reason, OSError) and not isinstance(reason, (ConnectionError, ssl.SSLError)):
            # The network failed. Not a ConnectionError: that mostly means that the process on the other side has ended,
            # which is logged where its death is seen.
            logger.warning("%s: its connection is lost: %s", self._who, reason)
        self._worker.left(self.stream, self._host)
        if self._agent is not None and self._group is not None:
            self._group.lost(self._agent)
            self._worker.inquiries.lost(self._agent)


class FrontConnection:
    """A connection of Main."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._requests: Requests | None = None
        self.stream: FrameStream[front.ToWorker] = FrameStream(
            front.ToWorker,
            self._frame,
            self._lost,
            on_made=_may_connect,
            on_admitted=self._made,
            share=True,
            relay=True,
            on_no_memory=self._no_memory,
        )

    def _made(self) -> None:
        self._requests = self._worker.new_requests(self.stream)

    def _frame(self, message: front.ToWorker, payload: Payload) -> None:
        assert self._requests is not None
        match message:
            case front.Infer():
                self._requests.infer(self.stream, message, payload)
            case front.Cancel(request=request):
                self._requests.cancel(request)
            case front.AskTimeline(request=request, deadline=deadline):
                self._worker.inquiries.ask(self.stream, request, deadline)

    def _no_memory(self, message: front.ToWorker, error: NoMemory) -> None:
        if not isinstance(message, front.Infer):
            raise error
        refuse(self.stream, message, Overloaded(f"the Worker has {error} of the request's inputs"))

    def _lost(self, reason: Exception | None) -> None:
        if self._requests is not None:
            self._requests.cancel_all()
            self._worker.main_left(self.stream)


def _may_connect(connection: socket.socket) -> bool:
    """Not from another user of this host."""
    if connection.family == socket.AF_UNIX and not same_user(connection):
        logger.warning("refused a local connection of another user")
        return False
    return True
