"""grpc.health.v1. Not grpcio's own servicer: that one writes to a watcher under a lock which a change of state needs,
too, so one watcher whose stream takes nothing would stop the news, and the server's end, for all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardserve.errors import shown

Response: TypeAlias = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """What `set` was last told; after `end` nothing serves, and watches are over."""

    def __init__(self) -> None:
        self._states: dict[str, bool] = {}
        self._watches: set[asyncio.Event] = set()
        self._ended = False

    def set(self, states: Mapping[str, bool]) -> None:
        """Of each service, whether it serves; those that aren't named are unknown."""
        if not self._ended:
            self._states = dict(states)
            self._wake()

    def end(self) -> None:
        self.set(dict.fromkeys(self._states, False))
        self._ended = True
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Response:
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {shown(request.service)} here")
        return Response(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(
            statuses={service: Response(status=self._status(service)) for service in self._states}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        changed = asyncio.Event()
        self._watches.add(changed)
        told = None
        try:
            while not self._ended or told != self._status(request.service):
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    await context.write(Response(status=status))
                    told = status
                else:
                    await changed.wait()
        finally:
            self._watches.discard(changed)

    def _status(self, service: str) -> Any:
        state = self._states.get(service)
        return Response.SERVICE_UNKNOWN if state is None else Response.SERVING if state else Response.NOT_SERVING

    def _wake(self) -> None:
        for watch in self._watches:
            watch.set()
