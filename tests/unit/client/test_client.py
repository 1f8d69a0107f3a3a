import asyncio
import socket
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from main_harness import Launcher, Worker, attached, echo, free_port, keep

from shardserve.client import AsyncClient, Client, SSLConfig
from shardserve.errors import ConfigError, DeadlineExceeded, InvalidInput, MessageTooLarge, NotFound, Unavailable
from shardserve.wire.messages import front, launch

X = {"x": np.arange(4, dtype=np.float32)}


def serve(test, script=echo, max_mb=100):
    """Runs the blocking `test(address, worker)` in a thread beside Main and an echo Worker."""

    async def run():
        worker = Worker(script)
        async with Launcher() as launcher:
            address = await launcher.grpc(max_mb)
            async with attached(launcher, worker):
                await asyncio.to_thread(test, address, worker)

    asyncio.run(run())


def test_all_kinds_of_values_there_and_back():
    values = [
        np.ones((2, 3), np.float16),
        np.array([1.5], ml_dtypes.bfloat16),
        np.array(3, np.uint8),
        np.zeros((0, 2), np.int64),
        np.array([True, False]),
        np.array(["a", "b"]),
    ]

    def test(address, worker):
        with Client(address, "echo", "predict") as client:
            for value, answer in zip(values, client.infer([{"x": value} for value in values]), strict=True):
                back = answer["x"]
                assert back.tolist() == value.tolist()
                assert back.shape == value.shape
                assert back.dtype == (object if value.dtype.kind == "U" else value.dtype)
                assert back.flags.writeable
            [answer] = client.infer({"x": 3})
            assert (answer["x"].dtype, answer["x"].tolist()) == (np.int64, [3])
            [answer] = client.infer({"x": 0.5})
            assert (answer["x"].dtype, answer["x"].tolist()) == (np.float64, [0.5])
            assert client.infer([{"x": "text"}, {"x": b"bytes"}]) == [{"x": "text"}, {"x": b"bytes"}]

    serve(test)


def test_infer_async_and_threads():
    def test(address, worker):
        with Client(address, "echo", "predict") as client:
            calls = [client.infer_async({"x": value}) for value in range(20)]
            assert [call.result()[0]["x"].tolist() for call in calls] == [[value] for value in range(20)]
            assert all(call.done() for call in calls)
            answers = []
            threads = [threading.Thread(target=lambda: answers.append(client.infer(X))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(answers) == 8

    serve(test)


def test_the_server_says_localhost_too():
    def test(address, worker):
        with Client(address.replace("127.0.0.1", "localhost"), "echo", "predict") as client:
            assert len(client.infer(X, timeout=10)) == 1

    serve(test)


def test_a_unix_address(tmp_path):
    async def run():
        address = f"unix:{tmp_path}/main.sock"
        async with Launcher() as launcher:
            await launcher.order(launch.StartGrpc, address, 100, None)
            async with attached(launcher, Worker()), AsyncClient(address, "echo", "predict") as client:
                assert len(await client.infer(X)) == 1

    asyncio.run(run())


def test_errors_are_dicts_or_exceptions():
    def test(address, worker):
        with Client(address, "nobody", "predict") as client:
            assert "no servable 'nobody'" in client.infer(X)["error"]
        with Client(address, "nobody", "predict", raise_errors=True) as client, pytest.raises(NotFound):
            client.infer(X)
        with Client(address, "echo", "predict") as client:
            good, bad = client.infer([X, {}])
            assert np.array_equal(good["x"], X["x"])
            assert list(bad) == ["error"]
            assert client.infer({"x": [1, 2]})["error"].startswith("instance 0, 'x': list is neither")
            assert client.infer_async(3).result()["error"].startswith("instances is a dict or a list of dicts")
            assert "RESOURCE_EXHAUSTED" in client.infer({"x": bytes(2 << 20)})["error"]
        with Client(address, "echo", "predict", raise_errors=True) as client:
            for instances, error in [({"x": None}, InvalidInput), ([{1: 2}], InvalidInput), ([X, {}], InvalidInput)]:
                with pytest.raises(error):
                    client.infer(instances)
            with pytest.raises(MessageTooLarge):
                client.infer({"x": bytes(2 << 20)})

    serve(test, max_mb=1)


def test_a_deadline():
    def test(address, worker):
        with Client(address, "echo", "predict") as client:
            started = time.monotonic()
            assert client.infer(X, timeout=0.3)["error"].startswith("DEADLINE_EXCEEDED: waited 0.")
            assert time.monotonic() - started < 2
            call = client.infer_async(X)
            call.cancel()
            assert "CANCELLED" in call.result()["error"]
        with Client(address, "echo", "predict", raise_errors=True) as client, pytest.raises(DeadlineExceeded):
            client.infer(X, timeout=0.3)

    serve(test, keep)


def test_nobody_there_is_an_error_soon():
    started = time.monotonic()
    address = f"127.0.0.1:{free_port()}"
    with Client(address, "echo", "predict") as client:
        assert client.infer(X)["error"].startswith("UNAVAILABLE")
    with Client(address, "echo", "predict", raise_errors=True) as client, pytest.raises(Unavailable):
        client.infer(X)
    assert time.monotonic() - started < 5


def test_somebody_there_who_says_nothing_is_an_error_within_the_timeout():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with Client(f"127.0.0.1:{silent.getsockname()[1]}", "echo", "predict") as client:
            started = time.monotonic()
            assert "error" in client.infer(X, timeout=0.5)
            assert time.monotonic() - started < 2


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
                    deadline = time.monotonic() + 10
                    while isinstance(answer := client.infer(X), dict) and time.monotonic() < deadline:
                        pass
                    return answer

                started = time.monotonic()
                assert isinstance(await asyncio.to_thread(until_it_answers), list)
                assert time.monotonic() - started < 3
            client.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", ":5500", "localhost:x", "localhost:0", "localhost:70000", "localhost:-1", "unix:", ""),
        *("http://localhost:5500", "local host:5500", "[]:5500", "localhost:5500 ", "localhost:٥٥", 5500, None, b"a:1"),
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match=r"^address: .* is not host:port or unix:path$"):
        Client(address, "echo", "predict")


def test_tls_files():
    with pytest.raises(ConfigError, match="both certificate and private_key"):
        SSLConfig(certificate="cert.pem")
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem: No such file"):
        Client("localhost:1", "echo", "predict", ssl_config=SSLConfig(custom_ca="/nowhere/ca.pem"))


def test_the_async_client_in_many_tasks():
    async def run():
        worker = Worker()
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, worker), AsyncClient(address, "echo", "predict") as client:
                answers = await asyncio.gather(*(client.infer({"x": value}) for value in range(50)))
                assert [answer[0]["x"].tolist() for answer in answers] == [[value] for value in range(50)]
                assert "error" in await client.infer({"x": None})
                worker.script = keep
                call = client.infer_async(X)
                for _ in range(51):
                    infer = await worker.next(front.Infer)
                call.cancel()
                assert (await worker.next(front.Cancel)).request == infer.request

    asyncio.run(run())
