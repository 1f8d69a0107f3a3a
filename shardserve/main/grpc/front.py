"""The gRPC front end: MSService.Predict, Admin.Status and Timeline, grpc.health.v1 and server reflection."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from shardserve.errors import InternalError, InvalidInput, MessageTooLarge, ShardserveError, StartError
from shardserve.main import addresses, status, timeline, tls
from shardserve.main.grpc.health import Health
from shardserve.main.grpc.methods import CarefulServer, abort, quiet_late_answers
from shardserve.main.router import MAX_STRINGS, Decoded, Router, check_count, infer, too_many_strings
from shardserve.main.servable import Result
from shardserve.wire import proto
from shardserve.wire.messages.launch import StartGrpc
from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs import ms_service_pb2_grpc, shardserve_pb2, shardserve_pb2_grpc

logger = logging.getLogger(__name__)

PredictContext: TypeAlias = "grpc.aio.ServicerContext[pb.PredictRequest, pb.PredictReply]"
StatusContext: TypeAlias = "grpc.aio.ServicerContext[shardserve_pb2.StatusRequest, shardserve_pb2.StatusReply]"
TimelineContext: TypeAlias = "grpc.aio.ServicerContext[shardserve_pb2.TimelineRequest, shardserve_pb2.TimelineReply]"

PREDICT = "mindspore.serving.proto.MSService"
ADMIN = "shardserve.v1.Admin"
MANY_STRINGS = 10_000
"""In one message; more of them take the event loop some 5 ms, and go to a thread: unlike JSON's, their loops let others
run in between."""

STRINGS_OF_TENSOR = 10
"""How many strings take as long as a tensor by itself."""

MOST_SHOWN = 100
"""Inputs over those of the method that are decoded, so that the error can name them."""

PENDING_CALLS = 1 << 14
"""Calls that gRPC's core keeps until its Python half takes them; more where twice max_calls is. Of each it may hold a
stream's window, 64 KB to begin with. It cancels those over it, by default some from 1000 on; so far above max_calls, it
leaves the refusal to that."""

PENDING_SECONDS = 86400
"""How long it keeps one, by default 30; its own deadline holds meanwhile."""

MAX_INT = (1 << 31) - 1  # Of a channel's option.


class Predict(ms_service_pb2_grpc.MSServiceServicer):
    def __init__(self, router: Router) -> None:
        self._router = router

    async def Predict(self, request: pb.PredictRequest, context: PredictContext) -> pb.PredictReply:
        spec = request.servable_spec
        try:
            servable, info = self._router.resolve(spec.name, spec.version_number, spec.method_name)
            left = context.time_remaining()
            deadline = None if left is None else time.monotonic() + left
            check_count(len(request.instances), self._router.settings.max_instances)
            most = len(info.inputs) + MOST_SHOWN
            if _is_large(request, most):
                instances = await asyncio.to_thread(_decode_all, request, most)
            else:
                instances = _decode_all(request, most)
            results = await infer(servable, spec.method_name, info, instances, deadline)
            if _are_large(results):
                return await asyncio.to_thread(_reply, spec, results)
            return _reply(spec, results)
        except ShardserveError as error:
            if error.in_reply:
                return pb.PredictReply(servable_spec=spec, error_msg=[_error_msg(error)])
            await abort(context, error)
        except Exception:
            logger.exception("a request of %s failed", context.peer())
            await abort(context, InternalError("a bug in the server; its log has the traceback"))
        raise AssertionError("abort raises")


class Admin(shardserve_pb2_grpc.AdminServicer):
    def __init__(self, router: Router) -> None:
        self._router = router

    async def Status(self, request: shardserve_pb2.StatusRequest, context: StatusContext) -> shardserve_pb2.StatusReply:
        return status.report(self._router)

    async def Timeline(
        self, request: shardserve_pb2.TimelineRequest, context: TimelineContext
    ) -> shardserve_pb2.TimelineReply:
        try:
            return await timeline.report(self._router, request.name, request.version, context.time_remaining())
        except ShardserveError as error:
            await abort(context, error)
        raise AssertionError("abort raises")


class GrpcFront:
    """One listening gRPC server."""

    def __init__(self, router: Router, server: grpc.aio.Server) -> None:
        self._router = router
        self._server = server
        self._careful = CarefulServer(server)
        self._health = Health()

    @classmethod
    async def start(cls, router: Router, order: StartGrpc) -> GrpcFront:
        """Listens as ordered; StartError names the address or the file that is wrong."""
        address = addresses.check_free(order.address, "gRPC address")
        # Replies are not limited: only the servable's author decides how large they are.
        calls = router.settings.max_calls
        pending = min(max(PENDING_CALLS, 2 * calls), MAX_INT)
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", order.max_msg_mb_size << 20),
            ("grpc.server.max_pending_requests", pending),
            ("grpc.server.max_pending_requests_hard_limit", pending),
            ("grpc.server_max_unrequested_time_in_server", PENDING_SECONDS),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)
        front = cls(router, server)
        quiet_late_answers()
        careful = front._careful
        ms_service_pb2_grpc.add_MSServiceServicer_to_server(Predict(router), careful)  # type: ignore[no-untyped-call]
        shardserve_pb2_grpc.add_AdminServicer_to_server(Admin(router), careful)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(front._health, careful)
        services = PREDICT, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME
        reflecting = reflection.aio.ReflectionServicer(services)  # type: ignore[attr-defined]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflecting, careful)
        try:
            if order.tls is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, tls.grpc_credentials(order.tls))
        except RuntimeError as error:
            raise StartError(f"gRPC address {order.address}: {error}") from error
        front._report_health()
        router.listeners.append(front._report_health)
        await server.start()
        return front

    async def stop(self, grace: float) -> None:
        """Takes no more calls and waits up to `grace` seconds until the answers of those under way have left."""
        self._health.end()
        self._careful.end_streams()
        await self._server.stop(grace)

    def _report_health(self) -> None:
        states = {"": self._router.ready, PREDICT: self._router.ready}
        for servable in self._router.servables:
            states[servable.name] = states.get(servable.name, False) or servable.state == "ready"
        self._health.set(states)


def _is_large(request: pb.PredictRequest, most: int) -> bool:
    """Whether what is decoded of it is more than MANY_STRINGS; MessageTooLarge if it isn't to be decoded at all."""
    strings = 0
    for instance in request.instances:
        items = instance.items
        if len(items) <= most:
            strings += STRINGS_OF_TENSOR * len(items)
            for tensor in items.values():
                count = len(tensor.bytes_val)
                if count > MAX_STRINGS:
                    raise too_many_strings(count)
                strings += count
        if strings > MANY_STRINGS:
            return True
    return False


def _are_large(results: list[Result]) -> bool:
    good = [result[0] for result in results if not isinstance(result, ShardserveError)]
    return sum(STRINGS_OF_TENSOR + len(meta.lengths or ()) for metas in good for meta in metas.values()) > MANY_STRINGS


def _decode_all(request: pb.PredictRequest, most: int) -> list[Decoded]:
    return [_decode(instance, index, most) for index, instance in enumerate(request.instances)]


def _decode(instance: pb.Instance, index: int, most: int) -> Decoded:
    if len(instance.items) > most:
        return InvalidInput(f"instance {index}: {len(instance.items)} inputs, far more than the method takes")
    try:
        return proto.from_instance(instance, f"instance {index}")
    except ShardserveError as error:
        return error


def _reply(spec: pb.ServableSpec, results: list[Result]) -> pb.PredictReply:
    reply = pb.PredictReply(servable_spec=spec)
    failed = False
    size = 0
    for result in results:
        instance = reply.instances.add()
        if isinstance(result, ShardserveError):
            failed = True
        else:
            size += proto.size_of(result[0])
            if size > proto.MAX_MESSAGE:
                raise MessageTooLarge(
                    f"the outputs have {size} bytes and more; a gRPC message has at most {proto.MAX_MESSAGE}"
                )
            proto.to_instance(instance, *result)
    if failed:
        reply.error_msg.extend(
            _error_msg(result if isinstance(result, ShardserveError) else None) for result in results
        )
    return reply


def _error_msg(error: ShardserveError | None) -> pb.ErrorMsg:
    return (
        pb.ErrorMsg() if error is None else pb.ErrorMsg(error_code=error.mindspore_code, error_msg=str(error).encode())
    )
