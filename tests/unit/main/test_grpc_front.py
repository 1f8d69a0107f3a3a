"""The gRPC front end: its address, its services, what goes through it."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from main_harness import Launcher, Worker, X, announce, attached, echo, keep, predict

from shardserve.client import AsyncClient, status
from shardserve.errors import MessageTooLarge, Unavailable
from shardserve.wire.messages import front, launch
from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceStub

PROTOS = Path(__file__).resolve().parents[3] / "protos"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_predict_gives_what_the_worker_answers():
    async def test(launcher, worker, client, address):
        [one] = await client.infer(X)
        assert np.array_equal(one["x"], X["x"])
        values = ["text", b"\0bytes", 3, 2.5, np.empty((0, 3), np.int8)]
        many = await client.infer([{"x": value} for value in values])
        assert [np.asarray(item["x"]).tolist() for item in many] == ["text", b"\0bytes", [3], [2.5], []]
        by_number = AsyncClient(address, "echo", "predict", version_number=1, raise_errors=True)
        assert len(await by_number.infer(X)) == 1
        await by_number.close()

    predict(test)


def test_large_tensors_pass_and_too_large_ones_are_refused():
    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc(max_mb=8)
            async with attached(launcher, worker), AsyncClient(address, "echo", "predict") as client:
                large = np.random.default_rng(0).random(1_000_000, np.float32)
                assert np.array_equal((await client.infer({"x": large}))[0]["x"], large)
                refused = await client.infer({"x": np.zeros(9 << 20, np.int8)})
                assert refused["error"].startswith("RESOURCE_EXHAUSTED")
                assert np.array_equal((await client.infer(X))[0]["x"], X["x"])

    asyncio.run(run())


def test_a_request_that_no_frame_can_carry_is_refused_alone():
    name = "x" * 20_000  # 4096 times in the header of one frame, which may have 64 MB.

    async def test(launcher, worker, client, address):
        methods = {"predict": front.MethodInfo(("x",), ("x",)), "long": front.MethodInfo((name,), (name,))}
        worker.send(announce(methods=methods))
        worker.script = keep
        under_way = client.infer_async(X)
        kept = await worker.next(front.Infer)
        async with AsyncClient(address, "echo", "long", raise_errors=True) as long:
            with pytest.raises(MessageTooLarge, match=r"RESOURCE_EXHAUSTED: tensors of .* bytes of names"):
                await long.infer([{name: 1}] * 4096)
        worker.script = echo
        assert len(await client.infer(X)) == 1
        worker.send(front.Reply(kept.request, [front.InstanceOutputs(kept.instances[0])]), [bytes(64)])
        assert len(await under_way) == 1
        assert not worker.lost.is_set()
        report = await asyncio.to_thread(status, address)
        assert report["servables"][0]["waiting_requests"] == 0

    predict(test)


def test_many_strings_and_small_calls_meanwhile():
    many = np.array([f"ñ{i}" for i in range(100_000)], object)

    async def test(launcher, worker, client, address):
        call = client.infer_async([{"x": many}, {"x": np.array([["a"], ["b"]])}])
        small = 0
        while not call.done():
            assert len(await client.infer(X)) == 1
            small += 1
        first, second = await call
        assert first["x"].tolist() == many.tolist()
        assert second["x"].tolist() == [["a"], ["b"]]
        assert small

    predict(test)


def test_what_no_method_takes_is_refused_before_it_is_decoded():
    async def test(launcher, worker, client, address):
        async with AsyncClient(address, "echo", "predict") as lenient:
            crowd = {str(number): 1 for number in range(50_000)}
            results = await lenient.infer([X, crowd, X])
            assert results[1] == {"error": "instance 1: 50000 inputs, far more than the method takes"}
            assert [list(result) for result in results] == [["x"], ["error"], ["x"]]
        request = pb.PredictRequest(servable_spec=pb.ServableSpec(name="echo", method_name="predict"))
        tensor = request.instances.add().items["x"]
        tensor.dtype = pb.MS_INT8
        tensor.shape.dims.extend([-1] * 1_000_000)
        async with grpc.aio.insecure_channel(address) as channel:
            reply = await MSServiceStub(channel).Predict(request)
        text = b"instance 0, input 'x': a shape of 1000000 dims; at most 32 are possible"
        assert [entry.error_msg for entry in reply.error_msg] == [text]

    predict(test)


def test_many_tensors_come_back_in_their_order():
    async def test(launcher, worker, client, address):
        results = await client.infer([{"x": number} for number in range(4000)])
        assert [int(result["x"][0]) for result in results] == list(range(4000))

    predict(test)


def test_before_a_servable_is_there():
    async def run():
        worker = Worker(greeting=announce(state="starting", reason="3 of 8 agents came"))
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with AsyncClient(address, "echo", "predict", raise_errors=True) as client:
                with pytest.raises(Unavailable, match="'echo' is not available yet"):
                    await client.infer(X)
                async with attached(launcher, worker):
                    with pytest.raises(Unavailable, match="is not available yet: 3 of 8 agents came"):
                        await client.infer(X)
                    async with grpc.aio.insecure_channel(address) as channel:
                        stub = health_pb2_grpc.HealthStub(channel)
                        watch = aiter_health(stub.Watch(health_pb2.HealthCheckRequest(service="echo")))
                        assert await anext(watch) == NOT_SERVING
                        worker.send(announce())
                        assert await anext(watch) == SERVING
                        assert len(await client.infer(X)) == 1
                        overall = await stub.Check(health_pb2.HealthCheckRequest())
                        assert overall.status == SERVING
                        worker.send(announce(state="recovering"))
                        assert await anext(watch) == NOT_SERVING
                        assert len(await client.infer(X)) == 1  # The Worker holds it, or answers.
                        worker.send(announce(state="failed", reason="restarted too often"))
                        worker.send(announce(name="other"))
                        await asyncio.wait_for(worker.lost.wait(), 30)

    asyncio.run(run())


async def aiter_health(watch):
    async for message in watch:
        yield message.status


def test_versions_and_the_latest_of_them():
    def answers(number):
        def script(worker, message, payload):
            worker.send(front.Failed(message.request, "StepError", f"version {number}"))

        return script

    async def run():
        workers = [Worker(answers(number), announce(version=number)) for number in (2, 10)]
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, *workers):
                for version, said in [(0, 10), (2, 2), (10, 10)]:
                    async with AsyncClient(address, "echo", "predict", version) as client:
                        assert await client.infer(X) == {"error": f"version {said}"}

    asyncio.run(run())


def test_a_busy_port_is_an_error_that_names_it(tmp_path):
    async def run():
        async with Launcher() as launcher:
            with socket.socket() as busy:
                busy.bind(("127.0.0.1", 0))
                busy.listen()
                address = f"127.0.0.1:{busy.getsockname()[1]}"
                for kind, name in ((launch.StartGrpc, "gRPC"), (launch.StartRest, "REST")):
                    refused = await launcher.give(kind, address, 100, None)
                    assert refused.error == "StartError"
                    assert refused.message == f"{name} address {address}: the port is in use"
            unix = f"unix:{tmp_path}/grpc.sock"
            await launcher.order(launch.StartGrpc, unix, 100, None)
            assert "in use" in (await launcher.give(launch.StartGrpc, unix, 100, None)).message
            long = f"unix:/{'d' * 107}"
            refused = await launcher.give(launch.StartGrpc, long, 100, None)
            said = f"gRPC address {long}: a socket's path has at most 107 bytes, this has 108"
            assert (refused.error, refused.message) == ("StartError", said)
            refused = await launcher.give(launch.StartGrpc, f"unix:{tmp_path}/no/such.sock", 100, None)
            assert refused.error == "StartError"
            assert refused.message == f"gRPC address unix:{tmp_path}/no/such.sock: there is no folder {tmp_path}/no"
            for wrong in ("5500", "127.0.0.1:", "127.0.0.1:99999", "unix:"):
                refused = await launcher.give(launch.StartGrpc, wrong, 100, None)
                assert refused.error == "ConfigError"
                assert refused.message == f"gRPC address: {wrong!r} is not ip:port or unix:path"
                refused = await launcher.give(launch.StartRest, wrong, 100, None)
                assert refused.message == f"REST address: {wrong!r} is not ip:port"
            for wrong in ("no-such-host.invalid:5500", "192.0.2.1:5500"):
                for kind in (launch.StartGrpc, launch.StartRest):
                    refused = await launcher.give(kind, wrong, 100, None)
                    assert refused.error == "StartError"
                    assert wrong in refused.message
            refused = await launcher.give(launch.Attach, "nobody", 1, "shardserve-test-nobody")
            assert "no Worker listens at @shardserve-test-nobody" in refused.message

    asyncio.run(run())


def test_reflection_lists_the_services():
    async def test(launcher, worker, client, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            async for reply in stub.ServerReflectionInfo(iter([request])):
                names = {service.name for service in reply.list_services_response.service}
        assert {"mindspore.serving.proto.MSService", "shardserve.v1.Admin", "grpc.health.v1.Health"} <= names

    predict(test)


FOREIGN_CLIENT = """
import sys, grpc, numpy as np
import ms_service_pb2 as pb, ms_service_pb2_grpc as services
assert not any(name.startswith("shardserve") for name in sys.modules)
request = pb.PredictRequest()
request.servable_spec.name, request.servable_spec.method_name = "echo", "predict"
tensor = request.instances.add().items["x"]
tensor.shape.dims.extend([2, 2])
tensor.dtype = 11
tensor.data = np.ones((2, 2), np.float32).tobytes()
reply = services.MSServiceStub(grpc.insecure_channel(sys.argv[1])).Predict(request, timeout=10)
assert not reply.error_msg and reply.servable_spec.name == "echo"
tensor = reply.instances[0].items["x"]
assert (list(tensor.shape.dims), tensor.dtype) == ([2, 2], 11)
assert np.frombuffer(tensor.data, np.float32).tolist() == [1, 1, 1, 1]
"""


def test_a_client_that_knows_only_the_proto_works(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which compiles the proto, isn't installed")
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--python_out={tmp_path}"]
    subprocess.run([*compiler, f"--grpc_python_out={tmp_path}", str(PROTOS / "ms_service.proto")], check=True)
    (tmp_path / "client.py").write_text(FOREIGN_CLIENT)

    async def test(launcher, worker, client, address):
        command = [sys.executable, str(tmp_path / "client.py"), address]
        await asyncio.to_thread(subprocess.run, command, check=True, cwd=tmp_path)

    predict(test)
