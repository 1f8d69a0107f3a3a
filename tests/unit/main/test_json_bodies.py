"""Large JSON bodies: read and written by a real process, while Main answers others."""

import asyncio
import os
import select
import signal
import time

import httpx
import msgspec
import numpy as np
import psutil
import pytest
from main_harness import Launcher, Worker, attached

from shardserve.client import AsyncClient
from shardserve.errors import InvalidInput, MessageTooLarge, StepError, Unavailable
from shardserve.main.json_bodies import LARGE, JsonBodies
from shardserve.wire import tensors
from shardserve.wire.messages import launch

ARRAY = np.arange(2 * LARGE, dtype=np.float32).reshape(64, -1)


def body(instances):
    """In pieces, as a server receives it."""
    data = msgspec.json.encode({"instances": instances})
    return [data[at : at + 65_000] for at in range(0, len(data), 65_000)]


def with_bodies(test):
    async def run():
        bodies = JsonBodies()
        await test(bodies)
        [process] = psutil.Process().children()
        assert "shardserve.main.json_process" in process.cmdline()
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
        [process] = psutil.Process().children()
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


def test_others_are_answered_while_a_large_body_is_read_and_written():
    large = np.random.default_rng(0).random((3000, 1000), np.float32)
    content = msgspec.json.encode({"instances": {"x": large.tolist()}})

    async def run():
        async with Launcher() as launcher:
            base, address = f"http://{await launcher.rest()}", await launcher.grpc()
            async with (
                attached(launcher, Worker()),
                AsyncClient(address, "echo", "predict") as client,
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
                [process] = psutil.Process(launcher.process.pid).children()
                ended = os.pidfd_open(process.pid)
                if how == "stop":
                    await launcher.order(launch.Stop, 1.0)
                else:
                    launcher.process.kill()
                await asyncio.to_thread(launcher.process.wait, 10)
                ready, _, _ = await asyncio.to_thread(select.select, [ended], [], [], 10)
                os.close(ended)
                assert ready

    asyncio.run(run())
