"""What the log says of calls that went wrong by no fault of the server."""

import logging

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from main_harness import predict

from shardserve.main.grpc.front import ADMIN, PREDICT
from shardserve.main.grpc.methods import quiet_late_answers


def test_an_answer_that_was_too_late_for_its_call_is_no_line_of_the_log(caplog):
    log = logging.getLogger("grpc._cython.cygrpc")
    before = list(log.filters)
    quiet_late_answers()
    try:
        for error in (cygrpc.ExecuteBatchError('Failed "execute_batch"'), ValueError("a bug")):
            log.error("raised by servicer method", exc_info=error)
    finally:
        log.filters[:] = before
    assert [record.exc_info[0] for record in caplog.records] == [ValueError]


@pytest.mark.parametrize(
    "method", [f"{PREDICT}/Predict", f"{ADMIN}/Status", f"{ADMIN}/Timeline", "grpc.health.v1.Health/Check"]
)
def test_a_request_that_can_not_be_read_is_told_so_without_a_line_of_the_log(method, capfd):
    async def test(launcher, worker, client, address):
        async with grpc.aio.insecure_channel(address) as channel:
            for junk in (b"\xff\xff\xff", b"\x0a\x05\x0a"):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await channel.unary_unary(f"/{method}")(junk)
                assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert raised.value.details().startswith("the request isn't a message of ")
                assert ("shardserve-error", "InvalidInput") in tuple(raised.value.trailing_metadata())
            watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(junk)
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await watching.read()
            reflecting = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
            await reflecting.write(junk)
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await reflecting.read()
            health = health_pb2_grpc.HealthStub(channel)
            good = await health.Check(health_pb2.HealthCheckRequest())
            assert good.status == health_pb2.HealthCheckResponse.SERVING

    predict(test)
    assert "ERROR" not in capfd.readouterr().err
