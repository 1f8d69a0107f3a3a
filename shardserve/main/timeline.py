"""What `Admin.Timeline` tells: when the steps of servables were where, as their Workers and agents recorded it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from shardserve.errors import DeadlineExceeded, ShardserveError
from shardserve.wire.messages import front
from shardserve.wire.messages.times import StepNames
from shardserve.wire.stubs import shardserve_pb2 as pb

if TYPE_CHECKING:
    from shardserve.main.router import Router
    from shardserve.main.servable import ServableVersion

Part = front.ReplicaTimeline | front.RankTimeline | front.TimelineEnd


@dataclass(eq=False)
class _Inquiry:
    reply: pb.ServableTimeline
    answer: asyncio.Future[pb.ServableTimeline] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class WorkerInquiries:
    """Those of one Worker that are under way or wait for their turn: it tells one at a time, or who asks again and
    again would hold up its steps, and fill Main's memory. A part of an answer is put into the reply as it comes: all
    of them at once would hold up the requests that are served meanwhile."""

    def __init__(self) -> None:
        self._under_way: dict[int, _Inquiry] = {}
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()

    async def ask(
        self, send: Callable[[msgspec.Struct], object], reply: pb.ServableTimeline, what: str, timeout: float
    ) -> pb.ServableTimeline:
        """The reply, completed by the Worker; DeadlineExceeded if that takes longer than `timeout` seconds, of which
        agents that don't answer have half."""
        number = next(self._numbers)
        deadline = time.monotonic() + timeout
        inquiry = self._under_way[number] = _Inquiry(reply)

        async def answer() -> pb.ServableTimeline:
            async with self._turn:
                if not inquiry.answer.done():  # The Worker may have ended.
                    send(front.AskTimeline(number, deadline))
                return await inquiry.answer

        try:
            return await asyncio.wait_for(answer(), timeout)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(
                f"waited {timeout:.3g} s for the Worker of {what} to tell what it recorded"
            ) from None
        finally:
            del self._under_way[number]

    def take(self, part: Part) -> None:
        """A part of an answer; of one that nobody waits for any more, it is dropped."""
        inquiry = self._under_way.get(part.request)
        if inquiry is None or inquiry.answer.done():
            return
        match part:
            case front.ReplicaTimeline():
                inquiry.reply.replicas.append(_replica(part))
            case front.RankTimeline():
                inquiry.reply.ranks.append(_rank(part))
            case front.TimelineEnd():
                inquiry.reply.capacity, inquiry.reply.now = part.capacity, part.now
                inquiry.reply.missing_ranks.extend(part.missing)
                inquiry.answer.set_result(inquiry.reply)

    def fail(self, error: ShardserveError) -> None:
        """The Worker has ended."""
        for inquiry in self._under_way.values():
            if not inquiry.answer.done():
                inquiry.answer.set_exception(error)


def _names(names: StepNames) -> dict[str, list[int]]:
    return {"incarnations": names.incarnations, "counters": names.counters, "steps": names.steps}


def _replica(part: front.ReplicaTimeline) -> pb.ReplicaTimeline:
    times = part.times
    return pb.ReplicaTimeline(
        replica=part.replica,
        **_names(times.names),
        subgraphs=times.subgraphs,
        instances=times.instances,
        forms=times.forms,
        dims=[pb.Dims(sizes=sizes) for sizes in times.dims],
        queued=times.queued,
        sent=times.sent,
        answered=times.answered,
        failed=times.failed,
        ended=times.ended,
    )


def _rank(part: front.RankTimeline) -> pb.RankTimeline:
    times = part.times
    return pb.RankTimeline(
        replica=part.replica,
        rank=part.rank,
        stage=part.stage,
        host=part.host,
        device=part.device,
        pid=part.pid,
        clock_offset=part.offset,
        clock_error=part.error,
        **_names(times.names),
        received=times.received,
        ready=times.ready,
        started=times.started,
        finished=times.finished,
    )


async def report(router: Router, name: str, version: int, left: float | None) -> pb.TimelineReply:
    """Of the servable with this name (version 0: the latest), or of all if it is empty: then one that can't answer has
    its reason instead. NotFound, Unavailable or DeadlineExceeded says why the one that is named can't. left: seconds
    until the client's deadline, None if it has none; what is known is given a little before it."""
    settings = router.settings
    timeout = settings.timeline_timeout
    if left is not None:
        timeout = min(timeout, left - min(settings.deadline_margin, left / 10))
    if name:
        return pb.TimelineReply(servables=[await router.find(name, version).timeline(timeout)])
    asked = (_timeline_or_reason(servable, timeout) for servable in router.servables)
    return pb.TimelineReply(servables=await asyncio.gather(*asked))


async def _timeline_or_reason(servable: ServableVersion, timeout: float) -> pb.ServableTimeline:
    try:
        return await servable.timeline(timeout)
    except ShardserveError as error:
        return pb.ServableTimeline(name=servable.name, version=servable.version, reason=str(error))
