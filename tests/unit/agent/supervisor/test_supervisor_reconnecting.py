"""A Worker that is gone, and comes back or stays away."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time

import psutil
import pytest
from asynchronous import asynchronous

from shardserve.errors import Unavailable
from shardserve.wire.messages import group

from ..scripted import HOST, Host, ScriptedWorker
from ..shards import write_shards

pytestmark = pytest.mark.usefixtures("nothing_left")


@asynchronous
async def test_the_worker_comes_back(tmp_path, ports):
    models = write_shards(tmp_path)
    worker = ScriptedWorker(ports[0], 2)
    async with Host(ports[0], models, ports[1]) as host:
        async with worker:
            _, agents = await worker.ready(host, 0, 1)
            await worker.form(agents)
        pids = [agent.register.pid for agent in agents]
        # Agents and supervisor come in any order.
        async with worker:
            again = {}
            while len(again) < 3:
                peer = await worker.arrived.get()
                message, _ = await peer.frames.get()
                if isinstance(message, group.Register):
                    assert message.incarnation == 1
                    again[message.rank] = message.pid
                else:
                    peer.send(group.Roster((HOST,)))
                    await peer.next(group.Enlist)
                    peer.send(group.Enlisted((0, 1), ("0", "1"), HOST, 2, 1, "net", 1))
                    again["supervisor"] = message.pid
            assert again == {0: pids[0], 1: pids[1], "supervisor": os.getpid()}
            assert not host.life.done()


@asynchronous
async def test_agents_that_left_are_forked_again_where_the_supervisor_was_not_told(tmp_path, ports):
    """A server that is stopped while the supervisor has no connection, and started again."""
    models = write_shards(tmp_path)
    worker = ScriptedWorker(ports[0], 2)
    async with Host(ports[0], models, ports[1]) as host:
        async with worker:
            supervisor, agents = await worker.ready(host, 0, 1)
            before = {agent.register.pid for agent in agents}
            supervisor.stream.abort()
            await worker.arrived.get()
            for agent in agents:
                agent.send(group.Exit("the servable is stopped"))
            await asyncio.to_thread(psutil.wait_procs, [psutil.Process(pid) for pid in before])
        async with worker:
            await worker.supervisor(0, 1)
            agents = await worker.agents(2)
            assert not before & {agent.register.pid for agent in agents}


@asynchronous
async def test_an_agent_that_hangs_while_the_worker_is_replaced_is_killed(tmp_path, ports, caplog):
    """The new Worker doesn't know it; the one that comes a little later may have been in a step, and stays."""
    models = write_shards(tmp_path)
    worker = ScriptedWorker(ports[0], 2)
    async with Host(ports[0], models, ports[1], step_timeout=1.9, abort_timeout=0.1) as host:
        async with worker:
            _, (late, hung) = await worker.ready(host, 0, 1)
            for agent in (late, hung):
                os.kill(agent.register.pid, signal.SIGSTOP)
        async with worker:
            supervisor = await worker.supervisor(0, 1)
            supervisor.send(group.HostWaits((0, 1)))
            began = time.monotonic()
            os.kill(late.register.pid, signal.SIGCONT)
            [late_again] = await worker.agents(1)
            supervisor.send(group.HostWaits((1,)))
            [reborn] = await worker.agents(1)
            assert time.monotonic() - began > 1.9
            assert (late_again.register.rank, late_again.register.pid) == (0, late.register.pid)
            assert reborn.register.rank == 1
            assert reborn.register.pid != hung.register.pid
            killed = f"rank 1 (pid {hung.register.pid}) is killed: it did not come to the Worker within step_timeout"
            assert f"{killed} (1.9 s)" in caplog.text
            assert f"pid {late.register.pid}) is killed" not in caplog.text
            assert not late_again.lost.is_set()


@asynchronous
async def test_that_the_worker_is_gone_is_said_once(tmp_path, ports, caplog):
    """Also where whoever holds its listeners takes connections, and ends with them."""
    models = write_shards(tmp_path, 1)
    worker = ScriptedWorker(ports[0], 1)
    async with Host(ports[0], models, ports[1]) as host:
        async with worker:
            supervisor = await worker.supervisor(0)
            await worker.agents(1)
            supervisor.send(group.HostReady())
            await host.ready
        async with worker:
            times = 0
            while times < 3:
                peer = await worker.arrived.get()
                message, _ = await peer.frames.get()
                times += isinstance(message, group.Introduce)
                peer.stream.abort()
    assert len([said for said in caplog.messages if "is gone" in said]) == 1


@asynchronous
async def test_the_worker_stays_away(tmp_path, ports, caplog):
    models = write_shards(tmp_path, 1)
    os.environ["SHARDSERVE_RECONNECT_TIMEOUT"] = "0.3"
    try:
        async with Host(ports[0], models, ports[1], reconnect_timeout=0.3) as host:
            async with ScriptedWorker(ports[0], 1) as worker:
                supervisor = await worker.supervisor(0)
                await worker.agents(1)
                supervisor.send(group.HostReady())
                await host.ready
            await host.life
            assert f"no Worker at {HOST}:{ports[0]} for 0.3 s (reconnect_timeout)" in caplog.text
    finally:
        del os.environ["SHARDSERVE_RECONNECT_TIMEOUT"]


@asynchronous
async def test_a_stop_does_not_wait_for_a_host_that_answers_nothing(tmp_path, ports):
    """As a Ctrl-C of agents whose server's host is off."""
    models = write_shards(tmp_path, 1)
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server((HOST, ports[0]), backlog=0))
        # The backlog takes one; the kernel drops what the others send.
        for _ in range(3):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(silent.getsockname())
        async with Host(ports[0], models, ports[1]) as host:
            await host.fork_server()
            while not [thread for thread in threading.enumerate() if thread.name == "connect"]:
                await asyncio.sleep(0)
            host.supervisor.stop()
            await asyncio.wait_for(host.life, 5)
            with pytest.raises(Unavailable, match="stopped before all agents were registered"):
                await host.ready
