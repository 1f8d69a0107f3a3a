"""When the last steps of a running server were queued, sent, started and finished, as JSON knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from shardserve.client import channel, codec
from shardserve.wire.stubs import shardserve_pb2 as pb
from shardserve.wire.stubs.shardserve_pb2_grpc import AdminStub


def timeline(
    address: str,
    name: str = "",
    version: int = 0,
    timeout: float | None = None,
    ssl_config: channel.SSLConfig | None = None,
) -> dict[str, Any]:
    """`{"servables": [{"name", "version", "reason", "capacity", "now", "missing_ranks", "replicas": [{"replica",
    "steps": […], "ranks": [{"rank", "stage", …, "clock_offset", "clock_error", "steps": […]}]}]}]}` of one servable, or
    of all.

    The Worker and each rank remember their last `capacity` steps, oldest first. A step of a replica has "generation"
    ([incarnation, counter]), "step" (its number there), "subgraph", "instances" (in the batch), "dims", "queued" (when
    the oldest of them began to wait), "sent", "answered", "failed" (the model raised) and "ended" (cut short with its
    generation); one of a rank "generation", "step", "received", "ready" (its input was there), "started" and
    "finished". Times are in seconds on the Worker's CLOCK_MONOTONIC, of which `now` is a reading; those of ranks on
    other hosts have been moved by `clock_offset`, which may be wrong by `clock_error` seconds. `missing_ranks` did not
    answer. A servable that can't answer has its `reason`, and raises if it is the one that is named (version 0: the
    latest): the class of shardserve.errors that fits, Unavailable if nobody answers.
    """
    seconds = channel.seconds(timeout)
    if name or version:
        codec.servable_spec(name, "timeline", version)
    request = pb.TimelineRequest(name=name, version=version)
    with channel.connect(address, ssl_config) as connection:
        try:
            reply = AdminStub(connection).Timeline(request, timeout=seconds)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise codec.from_rpc(error) from error
    return {"servables": [_servable(servable) for servable in reply.servables]}


def _servable(servable: pb.ServableTimeline) -> dict[str, Any]:
    ranks = sorted(servable.ranks, key=lambda rank: rank.rank)
    return {
        "name": servable.name,
        "version": servable.version,
        "reason": servable.reason,
        "capacity": servable.capacity,
        "now": servable.now,
        "missing_ranks": list(servable.missing_ranks),
        "replicas": [
            _replica(replica, [rank for rank in ranks if rank.replica == replica.replica])
            for replica in servable.replicas
        ],
    }


def _replica(replica: pb.ReplicaTimeline, ranks: list[pb.RankTimeline]) -> dict[str, Any]:
    dims = [dict(form.sizes) for form in replica.dims]
    times = zip(
        _names(replica),
        replica.subgraphs,
        replica.instances,
        replica.forms,
        replica.queued,
        replica.sent,
        replica.answered,
        replica.failed,
        replica.ended,
        strict=True,
    )
    steps = [
        {
            **name,
            "subgraph": subgraph,
            "instances": instances,
            "dims": dims[form],
            "queued": queued,
            "sent": sent,
            "answered": answered,
            "failed": failed,
            "ended": ended,
        }
        for name, subgraph, instances, form, queued, sent, answered, failed, ended in times
    ]
    return {"replica": replica.replica, "steps": steps, "ranks": [_rank(rank) for rank in ranks]}


def _rank(rank: pb.RankTimeline) -> dict[str, Any]:
    ahead = rank.clock_offset
    times = zip(_names(rank), rank.received, rank.ready, rank.started, rank.finished, strict=True)
    steps = [
        {
            **name,
            "received": received - ahead,
            "ready": ready - ahead,
            "started": started - ahead,
            "finished": finished - ahead,
        }
        for name, received, ready, started, finished in times
    ]
    return {
        "rank": rank.rank,
        "stage": rank.stage,
        "host": rank.host,
        "device": rank.device,
        "pid": rank.pid,
        "clock_offset": ahead,
        "clock_error": rank.clock_error,
        "steps": steps,
    }


def _names(recorded: pb.ReplicaTimeline | pb.RankTimeline) -> Iterator[dict[str, Any]]:
    for incarnation, counter, step in zip(recorded.incarnations, recorded.counters, recorded.steps, strict=True):
        yield {"generation": [incarnation, counter], "step": step}
