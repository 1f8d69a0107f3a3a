import asyncio
import threading

import pytest
from asynchronous import asynchronous

from shardserve.agent.supervisor.connecting import Connector
from shardserve.settings import Settings
from shardserve.wire.sockets import Address

from ..scripted import HOST


@asynchronous
async def test_whoever_waited_for_the_connection_may_be_gone(ports):
    """At the loop's end everything is cancelled, possibly after the connecting thread has said that it gives up."""
    complaints = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    stopping = threading.Event()
    connector = Connector(Address(HOST, ports[0]), Settings(), True, stopping)
    waiting = asyncio.ensure_future(connector.connect(float("inf")))
    await asyncio.sleep(0)
    [connecting] = [thread for thread in threading.enumerate() if thread.name == "connect"]
    stopping.set()
    connecting.join(30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0)
    assert not complaints
