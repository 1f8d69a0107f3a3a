import asyncio
import socket
import subprocess
import sys
import threading
import time

import grpc
import ml_dtypes
import numpy as np
import pytest
from main_harness import Launcher, Worker, attached, echo, free_port, keep

from shardserve.client import AsyncClient, Client, SSLConfig, codec, status
from shardserve.errors import (
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    NotFound,
    Overloaded,
    Unavailable,
)
from shardserve.wire.messages import front, launch
from shardserve.wire.stubs import ms_service_pb2 as pb

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


WRONG_ARGUMENTS = [
    (("", "predict"), {}, "servable_name='' is not a name"),
    (("echo", ""), {}, "method_name='' is not a name"),
    ((None, "predict"), {}, "servable_name=None is not a name"),
    (("echo", b"predict"), {}, "method_name=b'predict' is not a name"),
    (("\ud800", "predict"), {}, "servable_name='.ud800'"),
    *(
        (("echo", "predict", version), {}, f"version_number={version!r} is not an integer from 0 .* to {2**64 - 1}$")
        for version in (-1, "1", 2**64, 1.0, None, True)
    ),
    (("echo", "predict"), {"ssl_config": {"custom_ca": "x"}}, "ssl_config is a shardserve.client.SSLConfig, got dict"),
]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(("arguments", "options", "text"), WRONG_ARGUMENTS)
def test_arguments_that_are_wrong_are_named(kind, arguments, options, text):
    async def run():
        with pytest.raises(ConfigError, match=f"^{text}"):
            kind("127.0.0.1:5500", *arguments, **options)

    asyncio.run(run())


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), -float("inf"), "1", True])
def test_timeouts_that_are_none(timeout):
    text = f"^timeout={timeout!r} is not a positive number of seconds"

    async def run():
        async with AsyncClient("127.0.0.1:1", "echo", "predict") as client:
            with pytest.raises(ConfigError, match=text):
                await client.infer(X, timeout=timeout)

    with Client("127.0.0.1:1", "echo", "predict") as client:
        for call in (client.infer, client.infer_async):
            with pytest.raises(ConfigError, match=text):
                call(X, timeout=timeout)
    with pytest.raises(ConfigError, match=text):
        status("127.0.0.1:1", timeout=timeout)
    asyncio.run(run())


def test_long_timeouts():
    def test(address, worker):
        with Client(address, "echo", "predict", version_number=np.int64(1)) as client:
            for timeout in (1e300, float("inf"), np.float32(20), 2**70, None):
                assert len(client.infer(X, timeout=timeout)) == 1

    serve(test)


def test_a_name_that_can_not_be_sent():
    with Client("127.0.0.1:1", "echo", "predict") as client:
        assert client.infer([X, {"\ud800": 1}])["error"].startswith("instance 1: a name that can't be UTF-8")


def test_many_calls_at_once():
    def test(address, worker):
        with Client(address, "echo", "predict") as client:
            calls = [client.infer_async({"x": value}) for value in range(500)]
            assert [call.result()[0]["x"].tolist() for call in calls] == [[value] for value in range(500)]

    serve(test)


def test_closing_with_calls_under_way():
    def test(address, worker):
        client = Client(address, "echo", "predict")
        calls = [client.infer_async(X) for _ in range(5)]
        client.close()
        for call in calls:
            assert call.result()["error"].startswith("CANCELLED")
        client.close()
        for call in (client.infer, client.infer_async):
            with pytest.raises(ConfigError, match=r"the client of echo\.predict is closed"):
                call(X)

    serve(test, keep)


def test_closing_the_async_client_with_calls_under_way():
    async def run():
        worker = Worker(keep)
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, worker):
                client = AsyncClient(address, "echo", "predict")
                calls = [client.infer_async(X) for _ in range(5)]
                for _ in calls:
                    await worker.next(front.Infer)
                await client.close()
                answers = await asyncio.gather(*calls, return_exceptions=True)
                if sys.version_info >= (3, 11):  # Before, a task can't tell it from its own cancellation.
                    assert all(answer["error"].startswith("CANCELLED") for answer in answers)
                await client.close()
                with pytest.raises(ConfigError, match=r"the client of echo\.predict is closed"):
                    await client.infer(X)

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
                    await asyncio.wait_for(until_it_answers(client), 3)
                    launcher.process.kill()
                    await asyncio.wait_for(launcher.lost.wait(), 10)
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


REPLIES = [
    (pb.PredictReply(error_msg=[pb.ErrorMsg(error_code=1), pb.ErrorMsg()]), "2 errors for 0 instances"),
    (pb.PredictReply(instances=[pb.Instance(items={"y": pb.Tensor()})]), "unknown dtype number 0"),
]


@pytest.mark.parametrize(("reply", "text"), REPLIES)
def test_a_reply_that_is_none_is_an_error_like_others(reply, text):
    assert text in codec.decode_reply(reply, False)["error"]
    with pytest.raises(InternalError, match=text):
        codec.decode_reply(reply, True)


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("CLIENT: Sent message larger than max (2 vs. 1)", MessageTooLarge),
        ("SERVER: Received message larger than max (2 vs. 1)", MessageTooLarge),
        ("Concurrent RPC limit exceeded!", Overloaded),
        (None, Overloaded),
    ],
)
def test_what_grpc_itself_refuses(details, kind):
    assert type(codec.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, details, None)) is kind


def test_tls_files():
    with pytest.raises(ConfigError, match="both certificate and private_key"):
        SSLConfig(certificate="cert.pem")
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem: No such file"):
        Client("localhost:1", "echo", "predict", ssl_config=SSLConfig(custom_ca="/nowhere/ca.pem"))


def test_tls_files_that_are_something_else(tmp_path):
    """gRPC would take them, and never say which one is wrong."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    key.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for config, said in [
        (SSLConfig(custom_ca=str(key)), f"TLS file {key}: is no PEM file with a line -----BEGIN CERTIFICATE-----"),
        (
            SSLConfig(str(certificate), str(certificate)),
            f"TLS file {certificate}: is no PEM file with a line -----BEGIN PRIVATE KEY-----",
        ),
        (SSLConfig(str(certificate), str(key)), f"TLS files {certificate} and {key}: "),
        (SSLConfig(custom_ca=str(certificate)), f"TLS file {certificate}: "),
    ]:
        with pytest.raises(ConfigError) as raised:
            Client("localhost:1", "echo", "predict", ssl_config=config)
        assert str(raised.value).startswith(said)


def test_a_message_over_the_limit_names_the_setting():
    error = codec.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (2 vs. 1)", None)
    assert str(error).endswith("larger than max (2 vs. 1): the server's max_msg_mb_size is the limit")


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
