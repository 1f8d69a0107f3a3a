"""How a client finds its server, and what it says where there is none."""

import asyncio
import os
import socket
import subprocess
import sys
import time

import pytest
from main_harness import Launcher, Worker, attached
from ports import free_port

from shardserve.client import AsyncClient, Client
from shardserve.errors import Unavailable
from shardserve.wire.messages import launch

from .harness import X, serve


def test_the_server_says_localhost_too():
    def test(address, worker):
        with Client(address.replace("127.0.0.1", "localhost"), "echo", "predict", raise_errors=True) as client:
            assert len(client.infer(X, timeout=10)) == 1

    serve(test)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_proxy_is_asked_for_this_host(kind, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")

    async def run():
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, Worker()):
                for host in ("127.0.0.1", "localhost"):
                    client = kind(address.replace("127.0.0.1", host), "echo", "predict", raise_errors=True)
                    if kind is Client:
                        assert len(await asyncio.to_thread(client.infer, X)) == 1
                        client.close()
                    else:
                        assert len(await client.infer(X)) == 1
                        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("name", ["main.sock", "50% #1?", "a%20b", "größe"])
def test_a_unix_address(tmp_path, name):
    async def run():
        address = f"unix:{tmp_path}/{name}"
        async with Launcher() as launcher:
            await launcher.order(launch.StartGrpc, address, 100, None)
            assert os.listdir(tmp_path) == [name]
            assert "in use" in (await launcher.give(launch.StartGrpc, address, 100, None)).message
            client = AsyncClient(address, "echo", "predict", raise_errors=True)
            async with attached(launcher, Worker()), client:
                assert len(await client.infer(X)) == 1

    asyncio.run(run())


def test_nobody_there_is_an_error_soon():
    started = time.monotonic()
    address = f"127.0.0.1:{free_port()}"
    with Client(address, "echo", "predict") as client:
        assert client.infer(X)["error"].startswith("UNAVAILABLE")
    with Client(address, "echo", "predict", raise_errors=True) as client, pytest.raises(Unavailable):
        client.infer(X)
    assert time.monotonic() - started < 5


SCRIPT = """
import os, socket, sys, threading
from shardserve.client import Client, SSLConfig

def answer():
    connection, _ = listener.accept()
    connection.recv(1)
    connection.sendall(b"no TLS here")
    connection.close()

listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=answer, daemon=True).start()
with Client(f"127.0.0.1:{listener.getsockname()[1]}", "echo", "predict", ssl_config=SSLConfig()) as client:
    assert "the server speaks no TLS" in client.infer({"x": 1}, timeout=10)["error"]
assert os.environ.get("GRPC_VERBOSITY") == (sys.argv[1] if sys.argv[1:] else None)
"""


@pytest.mark.parametrize("level", [[], ["INFO"]])
def test_nothing_is_printed_of_a_handshake_that_fails_unless_grpc_is_told_to(level):
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment.update(zip(["GRPC_VERBOSITY"], level, strict=False))
    command = [sys.executable, "-c", SCRIPT, *level]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert ("andshake failed" in done.stderr) == bool(level)
    assert bool(done.stderr) == bool(level)


def test_somebody_there_who_says_nothing_is_an_error_within_the_timeout():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with Client(f"127.0.0.1:{silent.getsockname()[1]}", "echo", "predict") as client:
            started = time.monotonic()
            assert "error" in client.infer(X, timeout=0.5)
            assert time.monotonic() - started < 4


def test_a_server_that_comes_later_is_found():
    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = f"127.0.0.1:{free_port()}"
            client = Client(address, "echo", "predict")
            assert (await asyncio.to_thread(client.infer, X))["error"].startswith("UNAVAILABLE")
            await launcher.order(launch.StartGrpc, address, 100, None)
            async with attached(launcher, worker):

                def until_it_answers():
                    deadline = time.monotonic() + 30
                    while isinstance(answer := client.infer(X), dict) and time.monotonic() < deadline:
                        pass
                    return answer

                started = time.monotonic()
                assert isinstance(await asyncio.to_thread(until_it_answers), list)
                assert time.monotonic() - started < 10
            client.close()

    asyncio.run(run())


def test_a_server_that_is_restarted_is_found_again():
    async def until_it_answers(client):
        while isinstance(await asyncio.to_thread(client.infer, X), dict):
            pass

    async def run():
        client = None
        for _ in range(3):
            worker = Worker()
            async with Launcher() as launcher:
                if client is None:
                    address = await launcher.grpc()
                    client = Client(address, "echo", "predict")
                else:
                    assert "UNAVAILABLE" in client.infer(X)["error"]
                    await launcher.order(launch.StartGrpc, address, 100, None)
                async with attached(launcher, worker):
                    await asyncio.wait_for(until_it_answers(client), 10)
                    launcher.process.kill()
                    await asyncio.wait_for(launcher.lost.wait(), 30)
        client.close()

    asyncio.run(run())


FORKS = """
import os, sys
from shardserve.client import Client

address = sys.argv[1]
client = Client(address, "echo", "predict")
assert client.infer({"x": 1})[0]["x"] == 1
for same in (True, False) * 10:
    child = os.fork()
    if child == 0:
        client = client if same else Client(address, "echo", "predict")
        os._exit(client.infer({"x": 1}, timeout=10)[0]["x"].tolist() != [1])
    assert os.waitpid(child, 0)[1] == 0
assert client.infer({"x": 1})[0]["x"] == 1
"""


def test_a_client_survives_a_fork():
    def test(address, worker):
        subprocess.run([sys.executable, "-c", FORKS, address], check=True, timeout=60)

    serve(test)
