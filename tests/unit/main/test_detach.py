"""A servable whose start failed is forgotten: its requests end, and another may take its name."""

import asyncio

import numpy as np
from main_harness import Launcher, Worker, attached, echo, keep

from shardserve.client import AsyncClient
from shardserve.wire.messages import front, launch

X = {"x": np.ones(4, np.float32)}


def test_detach():
    async def run():
        first, second = Worker(keep), Worker(echo)
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, first), AsyncClient(address, "echo", "predict") as client:
                call = client.infer_async(X)
                await first.next(front.Infer)
                assert isinstance(await launcher.give(launch.Detach, "echo", 1), launch.Done)
                assert "UNAVAILABLE: servable 'echo' version 1 was not started" in (await call)["error"]
                assert "the server has no servable so far" in (await client.infer(X))["error"]
                # One that isn't there is no error: the launcher doesn't know how far a start came.
                assert isinstance(await launcher.give(launch.Detach, "echo", 1), launch.Done)
                async with attached(launcher, second):
                    assert np.array_equal((await client.infer(X))[0]["x"], X["x"])

    asyncio.run(run())
