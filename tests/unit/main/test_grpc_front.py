import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from main_harness import Launcher, Worker, announce, attached, echo, keep

from shardserve.client import AsyncClient, status
from shardserve.errors import (
    Aborted,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    NotFound,
    Overloaded,
    StepError,
    Unavailable,
)
from shardserve.wire.messages import TensorMeta, front, launch

PROTOS = Path(__file__).resolve().parents[3] / "protos"
X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def predict(test):
    """Runs `test(launcher, worker, client, address)` with an attached echo Worker."""

    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc()
            client = AsyncClient(address, "echo", "predict", raise_errors=True)
            async with attached(launcher, worker), client:
                await test(launcher, worker, client, address)

    asyncio.run(run())


def test_predict_gives_what_the_worker_answers():
    async def test(launcher, worker, client, address):
        [one] = await client.infer(X)
        assert np.array_equal(one["x"], X["x"])
        values = ["text", b"\0bytes", 3, 2.5, np.empty((0, 3), np.int8)]
        many = await client.infer([{"x": value} for value in values])
        assert [np.asarray(item["x"]).tolist() for item in many] == ["text", b"\0bytes", [3], [2.5], []]
        by_number = AsyncClient(address, "echo", "predict", version_number=1)
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
                assert len(await client.infer(X)) == 1

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


def test_calls_under_way_are_bounded(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_MAX_CALLS", "2")

    async def test(launcher, worker, client, address):
        worker.script = keep
        calls = [client.infer_async(X) for _ in range(2)]
        kept = [await worker.next(front.Infer) for _ in calls]
        with pytest.raises(Overloaded, match="RESOURCE_EXHAUSTED"):
            await client.infer(X)
        for message in kept:
            worker.send(front.Reply(message.request, [front.InstanceOutputs(message.instances[0])]), [bytes(64)])
        for call in calls:
            assert len(await call) == 1
        worker.script = echo
        assert len(await client.infer(X)) == 1

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


def test_names_that_are_wrong_say_what_there_is():
    async def test(launcher, worker, client, address):
        for arguments, text in [
            (("nobody", "predict"), "no servable 'nobody' here; there are: 'echo' version 1"),
            (("echo", "nothing"), "servable 'echo' version 1 has no method 'nothing'; it has: predict"),
            (("echo", "predict", 9), "servable 'echo' has no version 9; it has: 1"),
        ]:
            async with AsyncClient(address, *arguments) as wrong:
                assert await wrong.infer(X) == {"error": text}
            async with AsyncClient(address, *arguments, raise_errors=True) as wrong:
                with pytest.raises(NotFound):
                    await wrong.infer(X)

    predict(test)


def test_inputs_that_are_wrong():
    async def test(launcher, worker, client, address):
        with pytest.raises(InvalidInput, match="at least one instance"):
            await client.infer([])
        with pytest.raises(InvalidInput, match="instance 0: missing 'x' and unknown 'z'; method 'predict' takes"):
            await client.infer({"z": 1})
        async with AsyncClient(address, "echo", "predict") as lenient:
            results = await lenient.infer([X, {}, {**X, "z": 1}, X])
        assert [list(result) for result in results] == [["x"], ["error"], ["error"], ["x"]]
        assert results[1]["error"].startswith("instance 1: missing 'x'")
        infer = await worker.next(front.Infer)
        assert (len(infer.instances), infer.places) == (2, (0, 3))

    predict(test)


def test_instances_that_all_fail_have_their_errors_in_their_places():
    async def test(launcher, worker, client, address):
        async with AsyncClient(address, "echo", "predict") as lenient:
            for instances in ([{}], [{}, {"z": 1}]):
                results = await lenient.infer(instances)
                assert [list(result) for result in results] == [["error"]] * len(instances)
            assert "at least one instance" in (await lenient.infer([]))["error"]
        assert worker.frames.empty()

    predict(test)


def test_errors_of_instances_and_of_requests():
    def script(worker, message, payload):
        first = front.InstanceOutputs(message.instances[0])
        if message.method == "predict":
            failed = front.InstanceError("StepError", "id 9 is out of range")
            worker.send(front.Reply(message.request, [first, failed]), [memoryview(payload[:24])])
        else:
            worker.send(front.Failed(message.request, "Aborted", "two generations ended"))

    async def test(launcher, worker, client, address):
        worker.script = script
        worker.send(announce(methods={name: front.MethodInfo(("x",), ("x",)) for name in ("predict", "abort")}))
        async with AsyncClient(address, "echo", "predict") as lenient:
            good, bad = await lenient.infer([X, X])
        assert np.array_equal(good["x"], X["x"])
        assert bad == {"error": "id 9 is out of range"}
        with pytest.raises(StepError, match="out of range"):
            await client.infer([X, X])
        async with AsyncClient(address, "echo", "abort") as lenient:
            assert await lenient.infer(X) == {"error": "ABORTED: two generations ended"}
        async with AsyncClient(address, "echo", "abort", raise_errors=True) as strict:
            with pytest.raises(Aborted):
                await strict.infer(X)

    predict(test)


def test_a_long_text_does_not_break_the_status():
    def script(worker, message, payload):
        worker.send(front.Failed(message.request, "Unavailable", "é" * 20_000))

    async def test(launcher, worker, client, address):
        worker.script = script
        with pytest.raises(Unavailable, match=r"^UNAVAILABLE: é+$"):
            await client.infer(X)

    predict(test)


def test_a_bug_in_main_is_an_internal_error_without_a_traceback():
    def script(worker, message, payload):
        outputs = {"y": TensorMeta("float99", (0,), 0)}
        worker.send(front.Reply(message.request, [front.InstanceOutputs(outputs)]))

    async def test(launcher, worker, client, address):
        worker.script = script
        with pytest.raises(InternalError, match="INTERNAL: a bug in the server; its log has the traceback"):
            await client.infer(X)
        worker.script = echo
        assert len(await client.infer(X)) == 1

    predict(test)


def test_a_passed_deadline_is_answered_by_main_and_told_to_the_worker():
    async def test(launcher, worker, client, address):
        worker.script = keep
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"waited 0\.\d+ s for servable 'echo' version 1 to answer"):
            await client.infer(X, timeout=0.4)
        assert time.monotonic() - started < 1
        infer = await worker.next(front.Infer)
        assert 0 < infer.deadline - started < 0.6
        assert (await worker.next(front.Cancel)).request == infer.request

    predict(test)


def test_a_client_that_leaves_is_told_to_the_worker():
    async def test(launcher, worker, client, address):
        worker.script = keep
        call = client.infer_async(X)
        infer = await worker.next(front.Infer)
        assert infer.deadline is None
        call.cancel()
        assert (await worker.next(front.Cancel)).request == infer.request

    predict(test)


def test_unanswered_requests_go_to_the_next_worker_under_new_numbers():
    async def test(launcher, worker, client, address):
        worker.script = keep
        calls = [client.infer_async({"x": value}) for value in range(3)]
        first = [(await worker.next(front.Infer)).request for _ in calls]
        await worker.die()
        late = client.infer_async({"x": 3})
        worker.script = echo
        worker.greeting = announce(state="starting")
        await worker.start()
        answers = await asyncio.gather(*calls, late)
        assert [answer[0]["x"].tolist() for answer in answers] == [[0], [1], [2], [3]]
        again = [(await worker.next(front.Infer)).request for _ in range(4)]
        assert min(again) > max(first)
        report = await asyncio.to_thread(status, address)
        assert report["servables"][0]["resubmitted"] == 3
        assert report["servables"][0]["state"] == "recovering"

    predict(test)


def test_a_second_answer_is_ignored():
    def twice(worker, message, payload):
        echo(worker, message, payload)
        echo(worker, message, payload)

    async def test(launcher, worker, client, address):
        worker.script = twice
        for value in range(3):
            [answer] = await client.infer({"x": value})
            assert answer["x"] == value
        report = await asyncio.to_thread(status, address)
        assert report["servables"][0]["ignored_answers"] >= 2

    predict(test)


def test_a_request_under_which_workers_keep_ending_is_aborted():
    async def test(launcher, worker, client, address):
        worker.script = keep
        call = client.infer_async(X)
        for _ in range(3):
            await worker.next(front.Infer)
            await worker.die()
            if not call.done():
                await worker.start()
        with pytest.raises(Aborted, match="3 Workers of servable 'echo' version 1 ended"):
            await call

    predict(test)


def test_an_answer_that_is_no_answer_ends_the_connection_or_the_request():
    def script(worker, message, payload):
        worker.send(front.Reply(message.request, []))

    async def test(launcher, worker, client, address):
        worker.script = script
        async with AsyncClient(address, "echo", "predict") as lenient:
            assert "gave 0 results for 1 instances" in (await lenient.infer(X))["error"]
        worker.script = keep
        call = client.infer_async(X)
        infer = [await worker.next(front.Infer) for _ in range(2)][1]
        worker.send(front.Reply(infer.request, [front.InstanceOutputs(infer.instances[0])]))  # Without its payload.
        await asyncio.wait_for(worker.lost.wait(), 10)
        worker.script = echo
        await worker.start()
        assert len(await call) == 1

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
                        await asyncio.wait_for(worker.lost.wait(), 10)

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
