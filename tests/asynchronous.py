"""Tests that run in an event loop of their own."""

import asyncio
import functools


def asynchronous(test):
    """Runs a test in an event loop; whatever reaches the loop's exception handler fails it."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def body():
            errors = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            await asyncio.wait_for(test(*args, **kwargs), 60)
            assert not errors

        asyncio.run(body())

    return run
