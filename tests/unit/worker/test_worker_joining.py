"""Who may join a Worker, and who is refused."""

import asyncio
import contextlib
import errno
import os

import pytest
from asynchronous import asynchronous
from strangers import stranger

from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import Generation, group
from shardserve.wire.security import Admission, Security
from shardserve.wire.sockets import connect, twin_name

from .scene import Scene
from .test_registry import config

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"rank": 2}, "JoinRefused", "rank 2: the rank table has ranks 0 to 1"),
        ({"rank": 1, "shard": config(0)}, "ShardError", "rank 1: needs the shard device1, was given device0"),
        ({"rank": 0, "pid": 7}, "Unavailable", "rank 0: is already there (pid 1000 on 127.0.0.1)"),
        ({"rank": 1, "device": "cuda:1"}, "JoinRefused", "rank 1: runs on cuda:1, rank 0 on cpu"),
    ],
)
@asynchronous
async def test_agent_that_is_refused(tmp_path, free_port, fields, error, said):
    async with Scene(tmp_path, free_port) as scene:
        await (await scene.agent(0)).next(group.Registered)
        refused = await scene.agent(**fields)
        answer = await refused.next(group.Refuse)
        assert (answer.error, answer.message[: len(said)]) == (error, said)
        await refused.lost.wait()


@asynchronous
async def test_model_without_the_declared_batch_dim(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        shard = config(0)
        shard["signature"]["inputs"] = [{"name": "x", "dtype": "float32", "shape": []}]
        agent = await scene.agent(0, shard)
        answer = await agent.next(group.Refuse)
        assert answer.error == "ConfigError"
        assert answer.message == "with_batch_dim=True, but these inputs of the model share no first dim: x[]"


@asynchronous
async def test_supervisor_that_is_refused(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        answer = await (await scene.supervisor(count=3)).next(group.Refuse)
        assert answer == group.Refuse(
            "ConfigError", "3 model_files for 2 ranks: the rank table gives this host rank 0, 1"
        )


@pytest.mark.parametrize(
    "message",
    [
        group.Formed(Generation(100, 1)),
        group.Enlist((), None, None, 1),
        group.GaveUp(0, "x"),
    ],
)
@asynchronous
async def test_what_comes_out_of_turn_ends_the_connection(tmp_path, free_port, caplog, message):
    async with Scene(tmp_path, free_port) as scene:
        stranger = await scene.peer(group.ToAgent, twin_name(scene.address))
        stranger.send(message)
        await stranger.lost.wait()
        assert f"{type(message).__name__} came out of turn" in caplog.text


@asynchronous
async def test_junk_on_the_distributed_address_ends_its_connection_alone(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        reader, writer = await asyncio.open_unix_connection("\0" + twin_name(scene.address))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await (await scene.agent(0)).next(group.Registered)


def test_peer_may_be_a_blocking_socket(tmp_path, free_port):
    """As the agents are."""

    def ask(address):
        with contextlib.closing(FrameSocket(connect(address, 10), group.ToAgent)) as frames:
            frames.send(group.Register(0, 1, "s", "cpu", 0, "127.0.0.1:7000", [config(0)]))
            return frames.receive()[0]

    async def body():
        async with Scene(tmp_path, free_port) as scene:
            assert await asyncio.to_thread(ask, scene.address) == group.Registered(100)

    asyncio.run(body())


BY_TCP = "came by TCP, where only a secret or TLS can tell who it is: give join_secret_file"
STRANGER = """
def ask(connection, union, message):
    frames = FrameSocket(connection, union)
    try:
        frames.send(message)
        print(frames.receive()[0], flush=True)
    except (OSError, EOFError):
        print("nothing", flush=True)

for message in (group.Introduce(1, "stranger"), group.Register(0, 1, "s", "cpu", 0, "127.0.0.1:7000", [])):
    for family, where in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, "\\0" + {twin!r})):
        connection = socket.socket(family)
        connection.connect(where)
        ask(connection, group.ToAgent, message)
"""


@asynchronous
async def test_another_user_of_this_host_reaches_nothing(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port) as scene:
        with stranger(STRANGER.format(port=free_port, twin=twin_name(scene.address))) as process:
            said = (await asyncio.to_thread(process.stdout.read)).splitlines()
        assert said == [str(group.Refuse("JoinRefused", BY_TCP)), "nothing"] * 2
        assert f": {BY_TCP}" in caplog.text
        assert "refused a local connection of another user" in caplog.text
        # Nobody has taken its place.
        supervisor = await scene.supervisor()
        assert (await supervisor.next(group.Enlisted)).ranks == (0, 1)
        await (await scene.agent(0)).next(group.Registered)


@asynchronous
async def test_who_comes_by_tcp_is_taken_where_anybody_may(tmp_path, free_port):
    async with Scene(tmp_path, free_port, insecure=True) as scene:
        agent = await scene.agent_by_tcp(0)
        await agent.next(group.Registered)


@asynchronous
async def test_an_agent_with_a_secret_at_a_worker_without_one(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        agent = await scene.peer(group.ToAgent, twin_name(scene.address))
        agent.send(group.Join(bytes(32)))
        answer = await agent.next(group.Refuse)
        assert answer.error == "JoinRefused"
        assert "this Worker was given no join secret" in answer.message
        await agent.lost.wait()


@asynchronous
async def test_only_so_many_that_have_proved_nothing(tmp_path, free_port):
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("a secret")
    async with Scene(tmp_path, free_port, secret=str(secret), max_joining=2) as scene:
        silent = [await scene.peer(group.ToAgent, twin_name(scene.address)) for _ in range(3)]
        await silent[0].lost.wait()
        assert not silent[2].lost.is_set()
        admission = Admission(Security(b"a secret"), "Worker", 20, scene.address)
        agent = await scene.peer(group.ToAgent, twin_name(scene.address), admission)
        await agent.admitted.wait()
        agent.send(group.Register(0, 1, "s", "cpu", 0, "127.0.0.1:7000", [config(0)]))
        await agent.next(group.Registered)


@asynchronous
async def test_whose_connection_the_network_ended_is_said(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port, insecure=True) as scene:

        def ended(number):
            """As the transport says it (peer_timeout); of the only connection."""
            [stream] = scene.worker._connections
            stream._end(OSError(number, os.strerror(number)))

        supervisor = await scene.supervisor()
        await supervisor.next(group.Enlisted)
        ended(errno.ETIMEDOUT)
        await supervisor.lost.wait()
        agent = await scene.agent_by_tcp(0)
        await agent.next(group.Registered)
        port = agent.stream.peer_socket.getsockname()[1]
        ended(errno.EHOSTUNREACH)
        await agent.lost.wait()
    assert "the supervisor of ranks 0, 1 (pid 55, a local process): its connection is lost: [Errno 110]" in caplog.text
    assert f"rank 0 (pid 1000, 127.0.0.1:{port}): its connection is lost: [Errno 113]" in caplog.text
    assert "refused" not in caplog.text


@asynchronous
async def test_a_connection_that_the_network_ends_before_it_is_let_in_is_named(tmp_path, free_port, caplog):
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("a secret")
    async with Scene(tmp_path, free_port, secret=str(secret)) as scene:
        reader, writer = await asyncio.open_connection(*scene.address)
        while not scene.worker._joining:
            await asyncio.sleep(0.005)
        [stream] = scene.worker._joining
        port = writer.get_extra_info("sockname")[1]
        stream._end(OSError(errno.ETIMEDOUT, "Connection timed out"))
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert f"127.0.0.1:{port}, which was not admitted yet: its connection is lost: [Errno 110]" in caplog.text
