import asyncio
import socket
import threading

import pytest

from shardserve.wire.frames import FrameError, encode
from shardserve.wire.messages import TensorMeta, front
from shardserve.wire.segments import TOKEN
from shardserve.wire.stream import FrameStream

pytestmark = pytest.mark.usefixtures("nothing_left")


def infer(size):
    return front.Infer(1, "m", [{"x": TensorMeta("uint8", (size,), size)}], None)


def raises(message, payload):
    raise ValueError("a bug")


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"".join(encode(front.Cancel(1)))])
def test_junk_ends_the_connection_even_if_its_sender_reads_nothing(junk):
    async def run():
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        stream = FrameStream(front.ToWorker, raises, lost.set_result)
        await loop.create_unix_connection(lambda: stream, sock=ours)
        stream.send(infer(8 << 20), [bytes(8 << 20)])
        assert stream.unsent
        theirs.sendall(junk)
        reason = await asyncio.wait_for(lost, 10)
        assert isinstance(reason, FrameError if junk.startswith(b"GET") else ValueError)
        assert not stream.send(infer(1), [b"1"])
        theirs.close()

    asyncio.run(run())


def test_a_control_record_of_another_thread_is_written_by_the_loop_s():
    """Segments are given up by a timer's thread; transports are not for other threads than their loop's."""

    async def run():
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        stream = FrameStream(front.ToWorker, raises, lost.set_result, share=True)
        transport, _ = await loop.create_unix_connection(lambda: stream, sock=ours)
        writers = []
        write = transport.write
        transport.write = lambda data: (writers.append(threading.get_ident()), write(data))
        await asyncio.to_thread(stream._shared.forget_relayed, bytes(TOKEN))
        theirs.setblocking(False)
        assert await asyncio.wait_for(loop.sock_recv(theirs, 100), 10)
        assert writers == [threading.get_ident()]
        stream.close()
        await lost
        theirs.close()

    asyncio.run(run())
