"""Connections whose request never comes, or never as a whole: real sockets at a real Main."""

import asyncio
import contextlib
import json
import resource
import signal

import httpx
import pytest
from main_harness import Launcher, Worker, announce, attached, echo, keep

from shardserve.main.rest.protocol import MOST_PIPELINED
from shardserve.wire.messages import front
from shardserve.wire.process import SPARE

HEAD = b"POST /model/echo:predict HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"instances": {"x": 1}}'
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(BODY), BODY)
NOTHING = b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
REFUSED = b"waited 1 s (receive_timeout) for the head of a request"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "1")


def rest(test, script=echo, worker=None):
    """Runs `test(launcher, connect)` with an attached Worker; `connect` opens a connection."""

    async def run():
        async with Launcher() as launcher, contextlib.AsyncExitStack() as stack:
            host, port = (await launcher.rest()).split(":")

            async def connect(data=b""):
                reader, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.close)
                writer.write(data)
                return reader, writer

            async with attached(launcher, worker or Worker(script, announce())):
                await asyncio.wait_for(test(launcher, connect), 30)

    asyncio.run(run())


async def flood(reader, writer, data):
    """What comes until the end of the connection, while `data` is sent again and again; and how often it was."""
    reply = asyncio.create_task(reader.read())
    sent = 0
    while not reply.done():
        writer.write(data)
        sent += 1
        await asyncio.wait([reply], timeout=0.01)
    # A reset tells of bytes that came after the end, and may overtake the answer.
    return b"" if isinstance(reply.exception(), ConnectionError) else reply.result(), sent


async def answered(reader, status=200):
    """Reads one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))


def test_a_connection_that_sends_nothing_is_closed():
    async def test(launcher, connect):
        readers = [(await connect(silent))[0] for silent in (b"", b"\r\n")]
        assert [await reader.read() for reader in readers] == [b"", b""]

    rest(test)


def test_a_head_that_does_not_end_is_refused_with_its_connection():
    async def test(launcher, connect):
        readers = [(await connect(part))[0] for part in (b"P", HEAD, GOOD[: -len(BODY) - 2])]
        for reader in readers:
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
        other, blank = await connect(GOOD)
        await answered(other)
        blank.write(b"\r\n")
        assert REFUSED in await reader.read()
        assert await other.read() == b""

    rest(test)


def test_a_head_that_began_before_the_former_answers_does_not_idle(capfd):
    async def test(launcher, connect):
        reader, _ = await connect(GOOD * 10 + HEAD)
        for _ in range(10):
            await answered(reader)
        assert REFUSED in await reader.read()
        other, _ = await connect(GOOD)
        await answered(other)

    rest(test)
    assert "Traceback" not in capfd.readouterr().err


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
        reply, sent = await flood(*await connect(HEAD + b"X-More: "), b"a" * 10_000)
        assert sent < 100
        assert not reply or reply.startswith(b"HTTP/1.1 431 ")
        # Others' bytes, of a large body before it, don't count.
        body = BODY + b" " * 500_000
        reader, writer = await connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + GOOD[:-30])
        await answered(reader)
        writer.write(GOOD[-30:])
        await answered(reader)

    rest(test)


def test_trailers_are_bounded_as_a_head_is(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_RECEIVE_TIMEOUT", "60")

    async def test(launcher, connect):
        for fields in (b"X-More: 1\r\n" * 1000, b"a" * 10_000):
            reply, sent = await flood(*await connect(CHUNKED + b"0\r\nX-A: "), fields)
            assert sent < 100
            assert not reply or reply.startswith(b"HTTP/1.1 431 ")
            reader, writer = await connect(NOTHING + b"X-A: ")
            await answered(reader, 404)
            reply, sent = await flood(reader, writer, fields)
            assert sent < 100
            assert not reply

    rest(test)


def test_trailers_are_no_headers():
    async def test(launcher, connect):
        reader, _ = await connect(CHUNKED + b"0\r\nX-Request-Timeout: none\r\n\r\n")
        await answered(reader)

    rest(test)


def test_the_rest_of_an_answered_body_has_its_time_as_a_whole():
    async def drips(connect, rest_of_it):
        reader, writer = await connect(NOTHING)
        await answered(reader, 404)
        reply = asyncio.create_task(reader.read())
        while not reply.done():
            writer.write(rest_of_it)
            await asyncio.wait([reply], timeout=0.2)

    async def test(launcher, connect):
        await asyncio.wait_for(asyncio.gather(drips(connect, b"X-A: 1\r\n"), drips(connect, b"X")), 10)

    rest(test)


def test_a_head_whose_beginning_comes_with_another_request_is_not_too_large():
    async def test(launcher, connect):
        body = BODY + b" " * 80_000
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        reader, writer = await connect(head[:20])
        with pytest.raises(TimeoutError):  # Main reads this first.
            await asyncio.wait_for(reader.read(1), 0.2)
        launcher.process.send_signal(signal.SIGSTOP)  # And the following at once.
        writer.write(head[20:] + body + GOOD[:-30])
        await writer.drain()
        launcher.process.send_signal(signal.SIGCONT)
        await answered(reader)
        writer.write(GOOD[-30:])
        await answered(reader)

    rest(test)


@pytest.mark.parametrize("second", [HEAD + b"X-More: " + b"a" * 400_000, b"no HTTP\r\n\r\n"])
def test_a_refusal_is_not_taken_for_the_answer_before_it(second):
    came = asyncio.Event()
    release = asyncio.Event()
    tasks = []

    def later(worker, message, payload):
        async def answer():
            await release.wait()
            echo(worker, message, data)

        if isinstance(message, front.Infer):
            data = bytes(payload)
            came.set()
            tasks.append(asyncio.create_task(answer()))

    async def test(launcher, connect):
        reader, writer = await connect(GOOD)
        await came.wait()
        writer.write(second)
        other, _ = await connect(GOOD)  # Main has read the second when this one has come.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)
        release.set()
        await answered(other)
        with contextlib.suppress(ConnectionError):  # Bytes that nobody read.
            await answered(reader)
            assert await reader.read() == b""

    rest(test, later)


def test_blanks_around_a_header_are_none_of_it():
    async def test(launcher, connect):
        reader, _ = await connect(GOOD.replace(b"Host: x", b"Host: x\r\nX-Request-Timeout: \t30 \t"))
        await answered(reader)

    rest(test)


def test_an_upgrade_is_ignored(capfd):
    async def test(launcher, connect):
        for wish in (b"Upgrade, HTTP2-Settings\r\nUpgrade: h2c", b"upgrade\r\nUpgrade: websocket"):
            whole = GOOD.replace(b"Host: x", b"Host: x\r\nConnection: " + wish)
            reader, writer = await connect(whole[: -len(BODY)])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)
            writer.write(BODY)
            await answered(reader)
            writer.write(whole * 2 + GOOD)
            for _ in range(3):
                await answered(reader)

    rest(test)
    assert "pgrade" not in capfd.readouterr().err


def test_what_is_no_request_is_400_in_json(capfd):
    upgrade = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c"

    async def test(launcher, connect):
        no_path = GOOD.replace(b"/model/echo:predict", b"http://x")
        gzip = CHUNKED.replace(b"chunked", b"gzip")
        for bad, text in [
            (b"no HTTP\r\n\r\n", "isn't HTTP/1.1: "),
            (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT isn't a method"),
            (CHUNKED + b"no\r\n", "isn't HTTP/1.1: "),
            (no_path, "the request's target 'http://x' has no path"),
            (no_path.replace(b"Host: x", upgrade), "the request's target 'http://x' has no path"),
            (gzip, "isn't HTTP/1.1: Request has invalid `Transfer-Encoding`"),
            (gzip.replace(b"Host: x", upgrade), "isn't HTTP/1.1: Request has invalid `Transfer-Encoding`"),
        ]:
            reader, _ = await connect(bad)
            head, body = (await reader.read()).split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            [(key, said)] = json.loads(body).items()
            assert key == "error_msg"
            assert text in said

    rest(test)
    err = capfd.readouterr().err
    assert "nvalid" not in err
    assert "Traceback" not in err


def test_http_1_0_is_answered_without_a_100_and_closed():
    async def test(launcher, connect):
        old = GOOD.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: x", b"Expect: 100-continue")
        reader, _ = await connect(old)
        reply = await reader.read()
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close\r\n" in reply

    rest(test)


@pytest.mark.parametrize("others", [1, MOST_PIPELINED])
def test_a_client_that_leaves_with_more_requests_on_their_way_is_noticed(others):
    async def test(launcher, connect):
        for first, more in ((GOOD + GOOD * others, b""), (GOOD, GOOD * others)):
            _, writer = await connect(first)
            kept = await worker.next(front.Infer)
            if more:
                writer.write(more)
                _, other = await connect(GOOD)  # Main has read them when this one has come.
                await worker.next(front.Infer)
                other.close()
                await worker.next(front.Cancel)
            writer.close()
            assert (await worker.next(front.Cancel)).request == kept.request
        reader, writer = await connect(GOOD * 3)
        first = await worker.next(front.Infer)
        worker.send(front.Reply(first.request, [front.InstanceOutputs(first.instances[0])]), [bytes(64)])
        await answered(reader)
        second = await worker.next(front.Infer)
        writer.close()
        assert (await worker.next(front.Cancel)).request == second.request

    worker = Worker(keep, announce())
    rest(test, worker=worker)


def test_a_client_that_does_not_read_loses_its_connection():
    async def test(launcher, connect):
        body = json.dumps({"instances": {"x": "x" * 16_000_000}}).encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        readers = [(await connect(HEAD + close + length + body))[0] for close in (b"", b"Connection: close\r\n")]
        for reader in readers:
            await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):  # Each lasts as long as the client may take nothing.
            silent, _ = await connect()
            await silent.read()
        for reader in readers:
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < len(body)

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
            assert soft == hard - SPARE

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
