"""Calls of both clients."""

import asyncio
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from main_harness import Launcher, Worker, attached, keep

from shardserve.client import AsyncClient, Client
from shardserve.errors import ConfigError, DeadlineExceeded, InvalidInput, MessageTooLarge, NotFound
from shardserve.wire.messages import front

from .harness import X, serve


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


def test_a_deadline(monkeypatch):
    # On a busy machine Main's words may take longer than the default to come to the client.
    monkeypatch.setenv("SHARDSERVE_DEADLINE_MARGIN", "0.2")

    def test(address, worker):
        with Client(address, "echo", "predict") as client:
            started = time.monotonic()
            assert client.infer(X, timeout=1.5)["error"].startswith("DEADLINE_EXCEEDED: waited 1.")
            assert time.monotonic() - started < 10
            call = client.infer_async(X)
            call.cancel()
            assert "CANCELLED" in call.result()["error"]
        with Client(address, "echo", "predict", raise_errors=True) as client, pytest.raises(DeadlineExceeded):
            client.infer(X, timeout=0.3)

    serve(test, keep)


def test_long_timeouts():
    def test(address, worker):
        with Client(address, "echo", "predict", version_number=np.int64(1), raise_errors=True) as client:
            for timeout in (1e300, float("inf"), np.float32(20), 2**70, None):
                assert len(client.infer(X, timeout=timeout)) == 1

    serve(test)


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
