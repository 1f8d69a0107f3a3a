"""What `Admin.Status` tells: every servable, replica and rank, as the Workers announced them."""

from __future__ import annotations

from shardserve.main.router import Router
from shardserve.main.servable import ServableVersion
from shardserve.wire.messages import front
from shardserve.wire.stubs import shardserve_pb2 as pb


def report(router: Router) -> pb.StatusReply:
    return pb.StatusReply(servables=[_servable(servable) for servable in router.servables])


def _servable(servable: ServableVersion) -> pb.ServableStatus:
    reply = pb.ServableStatus(
        name=servable.name,
        version=servable.version,
        state=servable.state,
        reason=servable.reason,
        waiting_requests=len(servable.waiting),
        waiting_bytes=servable.waiting_bytes,
        resubmitted=servable.counters.resubmitted,
        ignored_answers=servable.counters.ignored_answers,
    )
    announce = servable.announce
    if announce is not None:
        reply.rank_size = announce.rank_size
        reply.stage_size = announce.stage_size
        for name, info in announce.methods.items():
            method = pb.MethodStatus(inputs=info.inputs, outputs=info.outputs, dtypes=info.dtypes)
            reply.methods[name].CopyFrom(method)
        reply.replicas.extend(map(_replica, announce.replicas))
    return reply


def _replica(replica: front.ReplicaStatus) -> pb.ReplicaStatus:
    generation = pb.Generation(incarnation=replica.generation.incarnation, counter=replica.generation.counter)
    ranks = [
        pb.RankStatus(
            rank=rank.rank, stage=rank.stage, host=rank.host, device=rank.device, pid=rank.pid, state=rank.state
        )
        for rank in replica.ranks
    ]
    return pb.ReplicaStatus(
        replica=replica.replica,
        generation=generation,
        state=replica.state,
        restarts=replica.restarts,
        ranks=ranks,
        dropped=replica.dropped,
        reason=replica.reason,
    )
