"""A blocking test beside Main and an echo Worker."""

import asyncio

import numpy as np
from main_harness import Launcher, Worker, attached, echo

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
