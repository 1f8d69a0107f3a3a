"""Large JSON bodies: read and written by a real process, while Main answers others."""

import asyncio
import os
import re
import select
import signal
import time

import httpx
import msgspec
import numpy as np
import psutil
import pytest
from main_harness import Launcher, Worker, announce, attached

from shardserve.client import AsyncClient
from shardserve.errors import DeadlineExceeded, InvalidInput, MessageTooLarge, StepError, Unavailable
from shardserve.main.rest.json_bodies import LARGE, JsonBodies
from shardserve.settings import Settings
from shardserve.wire import tensors
from shardserve.wire.messages import front, launch

PATH = "/model/echo:predict"
ARRAY = np.arange(2 * LARGE, dtype=np.float32).reshape(64, -1)


def body(instances):
    """In pieces, as a server receives it."""
    data = msgspec.json.encode({"instances": instances})
    return [data[at : at + 65_000] for at in range(0, len(data), 65_000)]


def the_process(of=None):
    [process] = psutil.Process(of).children()
    return process


def with_bodies(test, **settings):
    async def run():
        bodies = JsonBodies(Settings(**settings))
        await test(bodies)
        process = the_process()
        assert "shardserve.main.rest.json_process" in process.cmdline()
        await bodies.close()
        assert not process.is_running()

    asyncio.run(run())


@pytest.mark.usefixtures("nothing_left")
def test_large_bodies_are_read_and_written_as_small_ones_are():
    async def test(bodies):
        pieces = body([{"x": ARRAY.tolist(), "name": "ñ"}, {"x": [[1], [2, 3]]}, 3])
        good, ragged, none = await bodies.decode(pieces, {"x": "float64"}, 10)
        values = tensors.decode_instance(*good, "instance 0")
        assert values["x"].dtype == np.float64
        assert np.array_equal(values["x"], ARRAY)
        assert values["name"] == "ñ"
        assert isinstance(ragged, InvalidInput)
        assert str(ragged).startswith("instances[1].x[1]: a ragged array")
        assert str(none) == "instances[2] isn't an object"
        metas, parts = tensors.encode_instance({"y": ARRAY}, "instance 0")
        written = await bodies.encode([(metas, [np.frombuffer(part, np.uint8) for part in parts]), StepError("9")])
        first, second = msgspec.json.decode(written)["instances"]
        assert np.array_equal(np.float32(first["y"]), ARRAY)
        assert second == {"error_msg": "9"}
        with pytest.raises(InvalidInput, match="the body isn't JSON"):
            await bodies.decode([b"x" * LARGE * 2], {}, 10)
        with pytest.raises(MessageTooLarge, match="at most 1 instances"):
            await bodies.decode(pieces, {}, 1)

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
def test_a_body_under_which_the_process_dies_is_refused_alone():
    async def test(bodies):
        pieces = body({"x": ARRAY.tolist()})
        await bodies.decode(pieces, {}, 10)
        process = the_process()
        process.send_signal(signal.SIGSTOP)
        died, waiting = (asyncio.create_task(bodies.decode(pieces, {}, 10)) for _ in range(2))
        await asyncio.sleep(0)  # Lets the first one send.
        process.kill()
        with pytest.raises(Unavailable, match="the process that had this large JSON body ended"):
            await died
        [(metas, _)] = await waiting
        assert metas["x"].shape == ARRAY.shape

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
def test_who_gives_up_takes_nobody_elses_answer():
    async def test(bodies):
        await bodies.decode(body({"x": ARRAY.tolist()}), {}, 10)
        gone = asyncio.create_task(bodies.decode(body({"x": ARRAY.tolist()}), {}, 10))
        await asyncio.sleep(0)  # Lets it send.
        gone.cancel()
        [(metas, _)] = await bodies.decode(body({"z": ARRAY.tolist()}), {}, 10)
        assert list(metas) == ["z"]

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
def test_of_those_who_give_up_at_most_one_body_is_left():
    async def test(bodies):
        pieces = body({"x": ARRAY.tolist()})
        size = sum(map(len, pieces))
        await bodies.decode(pieces, {}, 10)
        process = the_process()
        process.send_signal(signal.SIGSTOP)
        asking = [asyncio.create_task(bodies.decode(pieces, {}, 10)) for _ in range(12)]
        for gone in asking:
            await asyncio.sleep(0)  # Lets it send, if it is its turn.
            gone.cancel()
            await asyncio.wait((gone,))
            assert size / 2 < bodies.unsent < 1.1 * size
        next_one = asyncio.create_task(bodies.decode(pieces, {}, 10))
        await asyncio.sleep(0)
        assert bodies.unsent < 1.1 * size
        process.send_signal(signal.SIGCONT)
        [(metas, _)] = await next_one
        assert metas["x"].shape == ARRAY.shape

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
def test_deadlines_hold_while_the_process_has_the_body_and_while_another_one_has_its_turn():
    async def test(bodies):
        pieces = body({"x": ARRAY.tolist()})
        size = sum(map(len, pieces))
        await bodies.decode(pieces, {}, 10)
        metas, parts = tensors.encode_instance({"y": ARRAY}, "instance 0")
        results = [(metas, [np.frombuffer(part, np.uint8) for part in parts])]
        process = the_process()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match=rf"^waited 0\.\d+ s for a JSON body of {size} bytes to be read$"):
            await bodies.decode(pieces, {}, 10, time.monotonic() + 0.1)
        said = rf"^waited 0\.\d+ s for outputs of {ARRAY.nbytes} bytes to be written as JSON$"
        with pytest.raises(DeadlineExceeded, match=said):
            await bodies.encode(results, time.monotonic() + 0.1)
        process.send_signal(signal.SIGCONT)
        [instance] = msgspec.json.decode(await bodies.encode(results))["instances"]
        assert np.array_equal(np.float32(instance["y"]), ARRAY)

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
def test_a_process_that_hangs_is_replaced(caplog):
    async def test(bodies):
        pieces = body({"x": ARRAY.tolist()})
        await bodies.decode(pieces, {}, 10)
        process = the_process()
        process.send_signal(signal.SIGSTOP)
        stuck, waiting = (asyncio.create_task(bodies.decode(pieces, {}, 10)) for _ in range(2))
        why = rf"waited 4 s \(json_timeout\) for a JSON body of {sum(map(len, pieces))} bytes to be read"
        with pytest.raises(
            DeadlineExceeded, match=rf"^{why}; the process that does it, pid {process.pid}, was killed$"
        ):
            await stuck
        [(metas, _)] = await waiting
        assert metas["x"].shape == ARRAY.shape
        assert the_process().pid != process.pid
        assert re.search(rf"\(pid {process.pid}\) is gone: {why}", caplog.text)

    # Long enough for the next one to start on a busy machine.
    with_bodies(test, json_timeout=4)


@pytest.mark.usefixtures("nothing_left")
def test_a_process_that_dies_too_often_is_not_started_until_the_window_is_over():
    async def test(bodies):
        pieces = body({"x": ARRAY.tolist()})
        seen = set()  # One that is dead may still be there.
        for _ in range(2):
            dies = asyncio.create_task(bodies.decode(pieces, {}, 10))
            while not (started := set(psutil.Process().children()) - seen):
                await asyncio.sleep(0)
            seen |= started
            started.pop().kill()
            with pytest.raises(Unavailable, match="the process that had this large JSON body ended"):
                await dies
        said = r"^the process for large JSON bodies died 2 times within 4 s \(max_restarts, restart_window\); until "
        with pytest.raises(Unavailable, match=said):
            await bodies.decode(pieces, {}, 10)
        assert len(await bodies.decode([b'{"instances": {}}'], {}, 10)) == 1

        async def until_taken():
            while True:
                try:
                    return await bodies.decode(pieces, {}, 10)
                except Unavailable:
                    await asyncio.sleep(0.1)

        assert len(await asyncio.wait_for(until_taken(), 30)) == 1

    with_bodies(test, max_restarts=1, restart_window=4)


def rest(test, monkeypatch, **settings):
    """Runs `test(http, content, process)`: the Worker answers with ARRAY whatever it is given, the process is there."""
    for name, value in settings.items():
        monkeypatch.setenv(f"SHARDSERVE_{name.upper()}", str(value))
    metas, parts = tensors.encode_instance({"x": ARRAY}, "instance 0")

    def script(worker, message, payload):
        if isinstance(message, front.Infer):
            worker.send(front.Reply(message.request, [front.InstanceOutputs(metas)]), parts)

    async def run():
        async with Launcher() as launcher:
            base = f"http://{await launcher.rest()}"
            worker = Worker(script, announce())
            async with attached(launcher, worker), httpx.AsyncClient(base_url=base, timeout=60) as http:
                content = b"".join(body({"x": ARRAY.tolist()}))
                assert (await http.post(PATH, content=content)).status_code == 200
                await test(http, content, the_process(launcher.process.pid))

    asyncio.run(run())


def test_a_reply_that_is_not_written_has_the_requests_deadline_and_its_own(monkeypatch):
    async def test(http, content, process):
        process.send_signal(signal.SIGSTOP)
        small = {"instances": {"x": 1}}
        reply = await http.post(PATH, json=small, headers={"x-request-timeout": "0.5"})
        assert reply.status_code == 504
        assert f"s for outputs of {ARRAY.nbytes} bytes to be written as JSON" in reply.json()["error_msg"]
        reply = await http.post(PATH, json=small)
        assert reply.status_code == 200  # After the process, which has what was given up, has been replaced.

    rest(test, monkeypatch, json_timeout=4)


def test_a_body_whose_client_left_while_it_was_read_takes_no_room(monkeypatch):
    async def test(http, content, process):
        process.send_signal(signal.SIGSTOP)

        _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(content)))
        writer.write(content)

        async def until(status):
            while (await http.post(PATH, content=b'{"instances": 1}')).status_code != status:
                pass

        # All of it has come: there is no room for even this one.
        await asyncio.wait_for(until(429), 30)
        writer.close()
        await asyncio.wait_for(until(400), 30)
        process.send_signal(signal.SIGCONT)
        assert (await http.post(PATH, content=content)).status_code == 200

    size = sum(map(len, body({"x": ARRAY.tolist()})))
    rest(test, monkeypatch, max_receiving_bytes=size + 10)


def test_others_are_answered_while_a_large_body_is_read_and_written():
    large = np.random.default_rng(0).random((3000, 1000), np.float32)
    content = msgspec.json.encode({"instances": {"x": large.tolist()}})

    async def run():
        async with Launcher() as launcher:
            base, address = f"http://{await launcher.rest()}", await launcher.grpc()
            async with (
                attached(launcher, Worker()),
                AsyncClient(address, "echo", "predict", raise_errors=True) as client,
            ):
                await client.infer({"x": 1})
                # In a thread of its own: what this side does with the bytes must not delay the small calls.
                post = asyncio.create_task(
                    asyncio.to_thread(httpx.post, f"{base}/model/echo:predict", content=content, timeout=60)
                )
                began, times = time.monotonic(), []
                while not post.done():
                    started = time.monotonic()
                    assert len(await client.infer({"x": 1})) == 1
                    times.append(time.monotonic() - started)
                took = time.monotonic() - began
                reply = await post
                assert reply.status_code == 200
                assert np.array_equal(np.float32(msgspec.json.decode(reply.content)["instances"][0]["x"]), large)
                print(f"{took:.2f} s, {len(times)} small calls, the longest {max(times):.3f} s")
                assert max(times) < took / 6

    asyncio.run(run())


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_process_ends_with_main(how):
    async def run():
        async with Launcher() as launcher:
            base = f"http://{await launcher.rest()}"
            async with attached(launcher, Worker()), httpx.AsyncClient(timeout=60) as http:
                reply = await http.post(f"{base}/model/echo:predict", json={"instances": {"x": ARRAY.tolist()}})
                assert reply.status_code == 200
                process = the_process(launcher.process.pid)
                ended = os.pidfd_open(process.pid)
                if how == "stop":
                    await launcher.order(launch.Stop, 1.0)
                else:
                    launcher.process.kill()
                await asyncio.to_thread(launcher.process.wait, 30)
                ready, _, _ = await asyncio.to_thread(select.select, [ended], [], [], 10)
                os.close(ended)
                assert ready

    asyncio.run(run())


@pytest.mark.usefixtures("nothing_left")
def test_a_small_body_of_many_keys_is_read_by_the_process():
    async def test(bodies):
        keys = {str(number): number for number in range(10_000)}
        data = msgspec.json.encode({"instances": keys})
        assert len(data) < LARGE
        [(metas, _)] = await bodies.decode([data], {}, 10)
        assert metas.keys() == keys.keys()

    with_bodies(test)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("output", [np.array([""] * 10_000, object), np.zeros((20_000, 0), np.float32)])
def test_a_small_output_of_many_strings_or_arrays_is_written_by_the_process(output):
    async def test(bodies):
        metas, parts = tensors.encode_instance({"y": output}, "instance 0")
        written = await bodies.encode([(metas, [np.frombuffer(part, np.uint8) for part in parts])])
        assert msgspec.json.decode(written) == {"instances": [{"y": output.tolist()}]}

    with_bodies(test)
