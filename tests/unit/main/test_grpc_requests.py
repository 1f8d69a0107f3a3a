"""Requests under way: deadlines, clients that leave, Workers that end."""

import asyncio
import itertools
import time

import numpy as np
import pytest
from limits import memory_left, no_descriptors_left
from main_harness import X, announce, echo, keep, predict

from shardserve.client import AsyncClient, status
from shardserve.errors import Aborted, DeadlineExceeded, MessageTooLarge, Overloaded
from shardserve.main.router import MAX_STRINGS
from shardserve.wire.messages import TensorMeta, front


def test_calls_under_way_are_bounded(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_MAX_CALLS", "2")

    async def test(launcher, worker, client, address):
        worker.script = keep
        calls = [client.infer_async(X) for _ in range(2)]
        kept = [await worker.next(front.Infer) for _ in calls]
        with pytest.raises(Overloaded, match=r"RESOURCE_EXHAUSTED: .* the server's max_calls is the limit"):
            await client.infer(X)
        for message in kept:
            worker.send(front.Reply(message.request, [front.InstanceOutputs(message.instances[0])]), [bytes(64)])
        for call in calls:
            assert len(await call) == 1
        worker.script = echo
        assert len(await client.infer(X)) == 1

    predict(test)


def test_thousands_of_calls_at_once_are_answered():
    """gRPC's own bounds of calls that it hasn't handed over yet, at most 1000 to 3000 by default, aren't in the way."""

    async def test(launcher, worker, client, address):
        answers = await asyncio.gather(*(client.infer({"x": value}) for value in range(2000)))
        assert [answer[0]["x"].item() for answer in answers] == list(range(2000))

    predict(test)


def test_calls_over_the_bound_are_told_so_however_many_there_are(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_MAX_CALLS", "2")

    async def test(launcher, worker, client, address):
        worker.script = keep
        calls = [client.infer_async(X) for _ in range(2000)]
        kept = [await worker.next(front.Infer) for _ in range(2)]
        for call in itertools.islice(asyncio.as_completed(calls), 1998):
            with pytest.raises(Overloaded, match="RESOURCE_EXHAUSTED"):
                await call
        for message in kept:
            worker.send(front.Reply(message.request, [front.InstanceOutputs(message.instances[0])]), [bytes(64)])
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(outcome, list) for outcome in outcomes) == 2

    predict(test)


def test_strings_of_a_request_are_bounded():
    async def test(launcher, worker, client, address):
        much, half = ({"x": np.array([b""] * count, object)} for count in (MAX_STRINGS + 1, MAX_STRINGS // 2))
        for request in (much, [half, half, {"x": b""}]):
            with pytest.raises(MessageTooLarge, match=f"at most {MAX_STRINGS} elements of .*, got {MAX_STRINGS + 1}$"):
                await client.infer(request)
        one, other = await client.infer([half, half])
        assert len(one["x"]) == len(other["x"]) == MAX_STRINGS // 2

    predict(test)


def test_a_passed_deadline_is_answered_by_main_and_told_to_the_worker(monkeypatch):
    # On a busy machine Main's words may take longer than the default to come to the client.
    monkeypatch.setenv("SHARDSERVE_DEADLINE_MARGIN", "0.2")

    async def test(launcher, worker, client, address):
        worker.script = keep
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"waited [01]\.\d+ s for servable 'echo' version 1 to answer"):
            await client.infer(X, timeout=1.5)
        assert time.monotonic() - started < 5
        infer = await worker.next(front.Infer)
        assert 0 < infer.deadline - started < 5
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
        worker.greeting = announce(state="recovering")
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


def test_an_answer_that_main_has_no_memory_for_fails_its_request_alone():
    size = 64 << 20

    def script(worker, message, payload):
        if message.instances[0]["x"].shape == (3,):
            result = front.InstanceOutputs({"x": TensorMeta("uint8", (size,), size)})
            worker.send(front.Reply(message.request, [result]), [bytes(size)])
        elif message.instances[0]["x"].shape == (1,):
            echo(worker, message, payload)

    async def test(launcher, worker, client, address):
        worker.script = script
        # The first answer comes by the socket, the others in shared memory.
        held = client.infer_async(X)
        with memory_left(size // 2, launcher.process.pid):
            for _ in range(3):
                with pytest.raises(Overloaded, match=f"the server has no memory for {size} bytes"):
                    await client.infer({"x": np.ones(3)})
        assert (await client.infer({"x": 1}))[0]["x"] == 1
        assert not held.done()
        assert not worker.lost.is_set()
        held.cancel()

    predict(test)


def test_without_descriptors_main_keeps_its_worker_and_finds_the_next():
    def script(worker, message, payload):
        count = message.instances[0]["x"].shape[0]
        # Each answer needs a piece of shared memory that Main has yet to open.
        result = front.InstanceOutputs({"x": TensorMeta("uint8", (count << 18,), count << 18)})
        worker.send(front.Reply(message.request, [result]), [bytes(count << 18)])

    async def test(launcher, worker, client, address):
        worker.script = script
        await client.infer({"x": np.ones(1)})
        with no_descriptors_left(launcher.process.pid):
            for count in (2, 9):
                assert len((await client.infer({"x": np.ones(count)}, timeout=10))[0]["x"]) == count << 18
            assert not worker.lost.is_set()
            await worker.die()
            await worker.start()
            for count in (1, 40):
                assert len((await client.infer({"x": np.ones(count)}, timeout=10))[0]["x"]) == count << 18

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
        await asyncio.wait_for(worker.lost.wait(), 30)
        worker.script = echo
        await worker.start()
        assert len(await call) == 1

    predict(test)
