"""Bounds, at sizes that a test can reach: the router in this process, the Worker scripted."""

import asyncio

import pytest
from main_harness import Worker, echo, keep

from shardserve.errors import DeadlineExceeded, InternalError, Overloaded, StartError, Unavailable
from shardserve.main.router import Router, infer
from shardserve.settings import Settings
from shardserve.wire import tensors
from shardserve.wire.messages import TensorMeta, front


def run(test, **settings):
    async def body():
        router = Router(Settings(**settings))
        worker = Worker(keep)
        changed = asyncio.Event()
        await router.attach("echo", 1, worker.address)
        router.listeners.append(changed.set)
        await worker.start()
        await asyncio.wait_for(changed.wait(), 10)
        try:
            await test(router, worker)
        finally:
            router.close()
            worker.listener.close()

    asyncio.run(body())


def ask(router, value=b"1234567890"):
    servable, info = router.resolve("echo", 0, "predict")
    instance = tensors.encode_instance({"x": value}, "instance 0")
    return asyncio.create_task(infer(servable, "predict", info, [instance], None))


def test_requests_are_bounded():
    async def test(router, worker):
        calls = [ask(router) for _ in range(3)]
        for _ in calls:
            await worker.next(front.Infer)
        with pytest.raises(Overloaded, match=r"3 requests wait for an answer already, at most 3 .*\(max_requests\)"):
            await ask(router)
        calls[0].cancel()
        cancelled = await worker.next(front.Cancel)
        assert cancelled.request == 1
        worker.script = echo
        assert len(await ask(router)) == 1

    run(test, max_requests=3)


def test_bytes_are_bounded_but_one_request_always_fits():
    async def test(router, worker):
        call = ask(router, bytes(200))
        await worker.next(front.Infer)
        with pytest.raises(
            Overloaded, match=r"requests of 200 bytes wait .* at most 100 at once \(max_request_bytes\)"
        ):
            await ask(router)
        await worker.die()
        worker.script = echo
        await worker.start()
        assert len(await call) == 1
        [servable] = router.servables
        assert (servable.waiting, servable.waiting_bytes) == ([], 0)

    run(test, max_request_bytes=100)


def test_what_the_worker_does_not_take_is_bounded():
    async def test(router, worker):
        worker._stream._transport.pause_reading()
        call = ask(router, bytes(8 << 20))
        await asyncio.sleep(0)  # Lets the call send.
        with pytest.raises(Overloaded, match=r"has yet to take .* at most 1048576 \(max_unsent_bytes\)"):
            await ask(router)
        call.cancel()

    run(test, max_unsent_bytes=1 << 20)


def test_a_deadline_while_no_worker_is_there_says_so():
    async def test(router, worker):
        servable, info = router.resolve("echo", 1, "predict")
        await worker.die()
        instance = tensors.encode_instance({"x": 1}, "instance 0")
        deadline = asyncio.get_running_loop().time() + 0.2
        with pytest.raises(DeadlineExceeded, match="to have a Worker again"):
            await infer(servable, "predict", info, [instance], deadline)
        assert (servable.waiting, servable.waiting_bytes) == ([], 0)

    run(test)


def test_a_listener_that_is_closed_ends_what_waits():
    async def test(router, worker):
        call = ask(router)
        await worker.next(front.Infer)
        worker.listener.close()
        await worker.die()
        with pytest.raises(Unavailable, match="was stopped"):
            await call
        with pytest.raises(Unavailable, match="is stopping"):
            await ask(router)

    run(test)


def test_nothing_is_attached_after_a_stop():
    async def test(router, worker):
        await router.stop(1)
        with pytest.raises(StartError, match="stopping"):
            await router.attach("late", 1, worker.address)
        with pytest.raises(Unavailable, match="stopping"):
            await ask(router)

    run(test)


def test_a_request_that_cannot_be_submitted_is_answered_and_let_go(caplog):
    async def test(router, worker):
        [servable] = router.servables
        unsendable = [{"x": TensorMeta("int8", (1 << 70,), 1)}]  # No number that msgpack has.
        with pytest.raises(InternalError, match=r"^a bug in the server; its log has the traceback$"):
            await servable.infer("predict", unsendable, [b"1"], None)
        assert (servable.waiting, servable.waiting_bytes) == ([], 0)
        assert "servable 'echo' version 1: a request could not be sent to its Worker" in caplog.text
        # Nor does one that waited for a Worker take its connection down when it comes.
        await worker.die()
        late = asyncio.create_task(servable.infer("predict", unsendable, [b"1"], None))
        good = ask_later(servable)
        await asyncio.sleep(0)  # Lets them wait.
        worker.script = echo
        await worker.start()
        with pytest.raises(InternalError):
            await late
        assert len(await good) == 1
        assert servable.counters.ignored_answers == 0

    run(test)


def ask_later(servable):
    """As `ask`, of a servable whose Worker isn't there."""
    instance, buffers = tensors.encode_instance({"x": 1}, "instance 0")
    return asyncio.create_task(servable.infer("predict", [instance], buffers, None))
