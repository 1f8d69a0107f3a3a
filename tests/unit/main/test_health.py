import asyncio
import struct

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from main_harness import Launcher, Worker, announce, attached, predict

from shardserve.wire.messages import launch

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

# Of HTTP/2 (RFC 9113, 6).
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name, value):
    """A literal one without a name of the table (RFC 7541, 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def watch_without_a_window(address):
    """Returns once the server has begun to answer; it can't send any of the message."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Watch",
        b":authority": address.encode(),
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        + frame(HEADERS, END_HEADERS, 1, b"".join(field(*pair) for pair in fields.items()))
        + frame(DATA, END_STREAM, 1, bytes(5))
    )
    kind = None
    while kind != HEADERS:
        head = await asyncio.wait_for(reader.readexactly(9), 10)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3], "big"))
    return writer


def test_a_watcher_that_takes_nothing_holds_up_nobody():
    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, worker), grpc.aio.insecure_channel(address) as channel:
                deaf = await watch_without_a_window(address)
                stub = health_pb2_grpc.HealthStub(channel)
                watch = stub.Watch(health_pb2.HealthCheckRequest())
                assert (await asyncio.wait_for(watch.read(), 10)).status == SERVING
                worker.send(announce(state="recovering"))
                assert (await asyncio.wait_for(watch.read(), 10)).status == NOT_SERVING
                assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
                worker.send(announce())
                assert (await asyncio.wait_for(watch.read(), 10)).status == SERVING
                await asyncio.wait_for(launcher.order(launch.Stop, 0.1), 10)
                assert (await watch.read()).status == NOT_SERVING
                assert await watch.read() == grpc.aio.EOF
                deaf.close()

    asyncio.run(run())


def test_services_are_listed_and_what_is_none_is_not_found():
    async def test(launcher, worker, client, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            listed = (await stub.List(health_pb2.HealthListRequest())).statuses
            assert {name: entry.status for name, entry in listed.items()} == dict.fromkeys(
                ("", "mindspore.serving.proto.MSService", "echo"), SERVING
            )
            unknown = health_pb2.HealthCheckRequest(service="nobody")
            with pytest.raises(grpc.aio.AioRpcError, match="no service 'nobody' here") as raised:
                await stub.Check(unknown)
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Check(health_pb2.HealthCheckRequest(service="x" * 20_000))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
            watch = stub.Watch(unknown)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            await launcher.order(launch.Stop, 10.0)
            assert await watch.read() == grpc.aio.EOF

    predict(test)
