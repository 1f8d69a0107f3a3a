"""Connections whose request never comes, or never as a whole: real sockets at a real Main."""

import asyncio
import contextlib
import resource

import httpx
import pytest
from main_harness import Launcher, Worker, announce, attached

HEAD = b"POST /model/echo:predict HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"instances": {"x": 1}}'
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
REFUSED = b"waited 1 s (receive_timeout) for the head of a request"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "1")


def rest(test):
    """Runs `test(launcher, connect)` with an attached echo Worker; `connect` opens a connection."""

    async def run():
        async with Launcher() as launcher, contextlib.AsyncExitStack() as stack:
            host, port = (await launcher.rest()).split(":")

            async def connect(data=b""):
                reader, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.close)
                writer.write(data)
                return reader, writer

            async with attached(launcher, Worker(greeting=announce())):
                await asyncio.wait_for(test(launcher, connect), 30)

    asyncio.run(run())


async def answered(reader, status=200):
    """Reads one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))


def test_a_connection_that_sends_nothing_is_closed():
    async def test(launcher, connect):
        for silent in (b"", b"\r\n"):
            reader, _ = await connect(silent)
            assert await reader.read() == b""

    rest(test)


@pytest.mark.parametrize("part", [b"P", HEAD, GOOD[: -len(BODY) - 2]])
def test_a_head_that_does_not_end_is_refused_with_its_connection(part):
    async def test(launcher, connect):
        reader, _ = await connect(part)
        reply = await reader.read()
        assert reply.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"connection: close\r\n" in reply
        assert b"content-type: application/json\r\n" in reply
        assert reply.endswith(b'{"error_msg":"%b"}' % REFUSED)

    rest(test)


def test_a_head_that_drips_has_no_more_time():
    async def test(launcher, connect):
        reader, writer = await connect(HEAD)
        reply = asyncio.create_task(reader.read())
        while not reply.done():
            writer.write(b"X-More: 1\r\n")
            await asyncio.wait([reply], timeout=0.1)
        assert REFUSED in reply.result()

    rest(test)


def test_the_next_head_of_a_connection_has_its_time():
    async def test(launcher, connect):
        reader, writer = await connect(GOOD)
        await answered(reader)
        writer.write(GOOD + HEAD)  # The second part comes while the first is under way, or right after its answer.
        await answered(reader)
        writer.write(b"X-More: 1\r\n")
        assert REFUSED in await reader.read()
        reader, writer = await connect(GOOD)
        await answered(reader)
        writer.write(b"\r\n")
        assert await reader.read() == b""

    rest(test)


def test_a_connection_idles_longer_between_requests():
    async def test(launcher, connect):
        reader, writer = await connect(GOOD)
        await answered(reader)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 2)
        writer.write(GOOD)
        await answered(reader)

    rest(test)


def test_a_body_that_nobody_reads_does_not_keep_its_connection():
    async def test(launcher, connect):
        reader, writer = await connect(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        await answered(reader, 404)
        writer.write(b"1")
        assert await reader.read() == b""

    rest(test)


def test_a_head_that_is_too_large_is_refused_with_its_connection(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "60")

    async def test(launcher, connect):
        reader, writer = await connect(HEAD + b"X-More: ")
        reply = asyncio.create_task(reader.read())
        while not reply.done():
            writer.write(b"a" * 10_000)
            await asyncio.wait([reply], timeout=0.01)
        # A reset tells of bytes that came after the end, and may overtake the answer.
        assert isinstance(reply.exception(), ConnectionError) or reply.result().startswith(b"HTTP/1.1 431 ")
        # Others' bytes, of a large body before it, don't count.
        body = BODY + b" " * 500_000
        reader, writer = await connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + GOOD[:-30])
        await answered(reader)
        writer.write(GOOD[-30:])
        await answered(reader)

    rest(test)


def test_half_heads_free_their_descriptors():
    async def test(launcher, connect):
        resource.prlimit(launcher.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        halves = [await connect(HEAD) for _ in range(80)]
        await asyncio.gather(*(reader.read() for reader, _ in halves), return_exceptions=True)
        reader, _ = await connect(GOOD)
        await answered(reader)

    rest(test)


def test_main_may_have_as_many_descriptors_as_the_host_allows():
    async def run():
        async with Launcher() as launcher, httpx.AsyncClient() as http:
            assert (await http.get(f"http://{await launcher.rest()}/healthz")).status_code == 503
            soft, hard = resource.prlimit(launcher.process.pid, resource.RLIMIT_NOFILE)
            assert soft == hard

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
