import asyncio
import signal
import subprocess
import sys
import textwrap

import grpc
import httpx
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from main_harness import Launcher, Worker, attached, echo, keep
from ports import free_port

from shardserve.client import AsyncClient
from shardserve.errors import Unavailable
from shardserve.wire.messages import front, launch

X = {"x": np.ones(4, np.float32)}


def test_stop_refuses_what_is_new_and_waits_for_what_is_under_way():
    async def run():
        worker = Worker(keep)
        async with Launcher() as launcher:
            grpc_address, rest_address = await launcher.grpc(), await launcher.rest()
            async with (
                attached(launcher, worker),
                AsyncClient(grpc_address, "echo", "predict") as client,
                httpx.AsyncClient(base_url=f"http://{rest_address}", timeout=20) as http,
            ):
                call = client.infer_async(X)
                post = asyncio.create_task(http.post("/model/echo:predict", json={"instances": {"x": 1}}))
                held = [await worker.next(front.Infer) for _ in range(2)]
                stop = launcher.give(launch.Stop, 30.0)
                # Orders are obeyed in turn, so this one is refused only after the stop has begun.
                refused = await launcher.give(launch.Attach, "late", 1, worker.address)
                assert refused.message == "the server is stopping"
                assert "UNAVAILABLE: the server is stopping" in (await client.infer(X))["error"]
                assert not stop.done()
                for message in held:
                    payload = np.ones(64, np.uint8)
                    worker.send(
                        front.Reply(message.request, [front.InstanceOutputs(message.instances[0])]), [payload.data]
                    )
                assert np.array_equal((await call)[0]["x"], np.frombuffer(bytes([1] * 16), np.float32))
                assert (await post).status_code == 200
                assert isinstance(await stop, launch.Done)
                assert await asyncio.to_thread(launcher.process.wait, 30) == 0

    asyncio.run(run())


def test_clients_that_go_on_while_it_stops_hear_that_it_is_unavailable():
    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc()
            answered = asyncio.Event()

            async def call_on():
                async with AsyncClient(address, "echo", "predict", raise_errors=True) as client:
                    while True:
                        await client.infer(X)
                        answered.set()

            async with attached(launcher, worker):
                clients = [asyncio.create_task(call_on()) for _ in range(30)]
                await answered.wait()
                await launcher.order(launch.Stop, 5.0)
                for client in clients:
                    with pytest.raises(Unavailable):
                        await client

    asyncio.run(run())


def test_stop_ends_what_is_not_answered_within_the_grace():
    async def run():
        worker = Worker(keep)
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, worker), AsyncClient(address, "echo", "predict") as client:
                call = client.infer_async(X)
                await worker.next(front.Infer)
                await launcher.order(launch.Stop, 0.2)
                assert (await call)["error"] == "UNAVAILABLE: the server stopped; it waited 0.2 s for this request"
                assert await asyncio.to_thread(launcher.process.wait, 30) == 0

    asyncio.run(run())


def test_stop_answers_bodies_that_are_still_being_received_and_read(capfd):
    large = {"instances": {"x": [0.5] * 100_000}}

    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.rest()
            async with (
                attached(launcher, worker),
                httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as http,
            ):
                assert (await http.post("/model/echo:predict", json=large)).status_code == 200
                (json_process,) = psutil.Process(launcher.process.pid).children()
                json_process.suspend()
                post = asyncio.create_task(http.post("/model/echo:predict", json=large))
                reader, writer = await asyncio.open_connection(*address.split(":"))
                writer.write(b"POST /model/echo:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{")
                assert (await http.get("/healthz")).status_code == 200  # Main has read what came before.
                await launcher.order(launch.Stop, 0.1)
                text = "the server stopped before it had answered this request"
                assert ((await post).status_code, (await post).json()) == (503, {"error_msg": text})
                half = await asyncio.wait_for(reader.read(), 10)
                assert half.startswith(b"HTTP/1.1 503 ")
                assert text.encode() in half
                writer.close()
                assert await asyncio.to_thread(launcher.process.wait, 30) == 0

    asyncio.run(run())
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", [launch.StartGrpc, launch.StartRest])
def test_a_front_end_that_is_being_opened_when_the_stop_comes_is_closed(kind, capfd):
    async def run():
        async with Launcher() as launcher:
            opened = launcher.give(kind, f"127.0.0.1:{free_port()}", 100, None)
            await launcher.order(launch.Stop, 0.1)
            assert isinstance(await opened, launch.Done)
            assert await asyncio.to_thread(launcher.process.wait, 30) == 0

    asyncio.run(run())
    assert "Event loop is closed" not in capfd.readouterr().err


def test_stop_with_idle_connections_is_quick():
    async def run():
        worker = Worker(echo)
        async with Launcher() as launcher:
            rest, address = await launcher.rest(), await launcher.grpc()
            async with (
                attached(launcher, worker),
                httpx.AsyncClient(base_url=f"http://{rest}") as http,
                grpc.aio.insecure_channel(address) as channel,
            ):
                assert (await http.get("/healthz")).status_code == 200
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
                await reflected.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                assert (await reflected.read()).list_services_response.service
                await asyncio.wait_for(launcher.order(launch.Stop, 30.0), 15)
                assert await reflected.read() == grpc.aio.EOF
                assert await asyncio.to_thread(launcher.process.wait, 30) == 0

    asyncio.run(run())


def test_the_end_of_the_launchers_stream_ends_main():
    async def run():
        worker = Worker(keep)
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, worker), AsyncClient(address, "echo", "predict") as client:
                call = client.infer_async(X)
                await worker.next(front.Infer)
                launcher.end_stream()
                assert await asyncio.to_thread(launcher.process.wait, 30) == 1
                assert "UNAVAILABLE" in (await call)["error"]

    asyncio.run(run())


def test_signals_of_the_terminal_are_the_launchers():
    async def run():
        worker = Worker(echo)
        async with Launcher() as launcher:
            address = await launcher.grpc()
            client = AsyncClient(address, "echo", "predict", raise_errors=True)
            async with attached(launcher, worker), client:
                for number in (signal.SIGINT, signal.SIGTERM):
                    launcher.process.send_signal(number)
                assert len(await client.infer(X)) == 1

    asyncio.run(run())


def test_main_dies_with_a_killed_launcher_whose_stream_stays_open():
    """A grandchild holds the launcher's end, so only the kernel's signal can tell."""
    script = textwrap.dedent(
        """
        import os, socket, subprocess, sys
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "shardserve.main", str(theirs.fileno())]
        main = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        keeper = subprocess.Popen(["sleep", "60"], pass_fds=[ours.fileno()], stdout=subprocess.DEVNULL)
        theirs.close()
        from shardserve.wire.messages import launch
        from shardserve.wire.frames import encode
        ours.sendall(b"".join(encode(launch.Attach(1, "x", 1, "shardserve-test-none"))))
        ours.recv(1)  # Main is up: it answered.
        print(main.pid, keeper.pid, flush=True)
        sys.stdin.read()
        """
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    main, keeper = (psutil.Process(int(pid)) for pid in launcher.stdout.readline().split())
    launcher.kill()
    launcher.communicate()
    try:
        psutil.wait_procs([main], timeout=30)
        assert not main.is_running() or main.status() == psutil.STATUS_ZOMBIE
    finally:
        keeper.kill()
