"""The state of a running server, as JSON knows it."""

from __future__ import annotations

from typing import Any

import grpc

from shardserve.client import channel, codec
from shardserve.wire.stubs import shardserve_pb2 as pb
from shardserve.wire.stubs.shardserve_pb2_grpc import AdminStub


def status(address: str, timeout: float | None = None, ssl_config: channel.SSLConfig | None = None) -> dict[str, Any]:
    """`{"servables": [{"name", "version", "state", "rank_size", "stage_size", "replicas": […], …}]}`.

    A generation is [incarnation, counter], so that comparing two tells which is later. A rank whose state is absent has
    device "" and pid None (os.kill of 0 would end the caller's own group). `restarts` (generations that ended) and
    `dropped` (frames that came from an agent in another generation) count since the Worker started; the incarnation
    tells when that changes. Raises the class of shardserve.errors that fits, Unavailable if nobody answers.
    """
    seconds = channel.seconds(timeout)
    with channel.connect(address, ssl_config) as connection:
        try:
            reply = AdminStub(connection).Status(pb.StatusRequest(), timeout=seconds)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise codec.from_rpc(error) from error
    return {"servables": [_servable(servable) for servable in reply.servables]}


def _servable(servable: pb.ServableStatus) -> dict[str, Any]:
    methods = {
        name: {"inputs": list(method.inputs), "outputs": list(method.outputs), "dtypes": dict(method.dtypes)}
        for name, method in sorted(servable.methods.items())
    }
    return {
        "name": servable.name,
        "version": servable.version,
        "state": servable.state,
        "reason": servable.reason,
        "rank_size": servable.rank_size,
        "stage_size": servable.stage_size,
        "replicas": [_replica(replica) for replica in servable.replicas],
        "methods": methods,
        "waiting_requests": servable.waiting_requests,
        "waiting_bytes": servable.waiting_bytes,
        "resubmitted": servable.resubmitted,
        "ignored_answers": servable.ignored_answers,
    }


def _replica(replica: pb.ReplicaStatus) -> dict[str, Any]:
    return {
        "replica": replica.replica,
        "generation": [replica.generation.incarnation, replica.generation.counter],
        "state": replica.state,
        "reason": replica.reason,
        "restarts": replica.restarts,
        "dropped": replica.dropped,
        "ranks": [
            {
                "rank": rank.rank,
                "stage": rank.stage,
                "host": rank.host,
                "device": rank.device,
                "pid": rank.pid or None,
                "state": rank.state,
            }
            for rank in replica.ranks
        ],
    }
