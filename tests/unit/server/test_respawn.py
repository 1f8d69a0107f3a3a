"""Launchers in this process, with a real Main and Worker; agents by script."""

import asyncio
import os
import select
import signal
import socket
from dataclasses import replace

import psutil
import pytest
from agent.scripted import logged, no_descriptors_left
from asynchronous import asynchronous
from worker.scene import Peer
from worker.test_registry import config

from shardserve.errors import ConfigError, StartError
from shardserve.server.children import Child
from shardserve.server.launcher import Launcher, ServableOptions
from shardserve.settings import Settings
from shardserve.wire.messages import group, launch
from shardserve.wire.sockets import Address, twin_name

from .scripts import write_servable

pytestmark = pytest.mark.usefixtures("nothing_left")


class Setting:
    """`async with`; one launcher, and one servable, in replicas of two ranks, that is opened and not yet run."""

    def __init__(self, directory, wait=0.0, replicas=1):
        write_servable(directory, ranks=2 * replicas)
        self.options = ServableOptions(
            servable_directory=str(directory),
            servable_name="net",
            version_number=1,
            rank_table_json_file=str(directory / "ranks.json"),
            distributed_address=Address("127.0.0.1", 0),
            wait_agents_time_in_seconds=wait,
        )
        self.launcher = Launcher(Settings())
        self.peers = []
        self.replicas = range(replicas)

    async def __aenter__(self):
        self.life = asyncio.ensure_future(self.launcher.run())
        self.service = await self.launcher.open_servable(self.options)
        return self

    async def __aexit__(self, *error):
        # First, since the Worker would wait for agents to leave.
        for peer in self.peers:
            peer.stream.abort()
            await peer.lost.wait()
        self.launcher.stop()
        await self.life

    async def agents(self, replica=0):
        """Both ranks' agents, as far as the order to form; they have to say yet that they did."""
        agents = []
        for rank in (2 * replica, 2 * replica + 1):
            agent = Peer(group.ToAgent)
            name = "\0" + twin_name(self.service.options.distributed_address)
            await asyncio.get_running_loop().create_unix_connection(lambda peer=agent: peer.stream, name)
            self.peers.append(agent)
            agent.send(group.Register(rank, 7, "s", "cpu", 0, f"127.0.0.1:{7000 + rank}", [config(rank % 2)]))
            agents.append(agent)
        return agents, (await agents[0].next(group.Form)).generation

    async def run(self):
        """The servable is ready; returns its Worker."""
        start = asyncio.ensure_future(self.launcher.run_servable(self.service))
        for replica in self.replicas:
            await self.form(replica)
        await start
        return self.service.worker

    async def form(self, replica=0):
        agents, generation = await self.agents(replica)
        for agent in agents:
            agent.send(group.Formed(generation))


@asynchronous
async def test_a_worker_that_dies_as_soon_as_it_is_ready_is_respawned(tmp_path, caplog):
    async with Setting(tmp_path) as s:
        start = asyncio.ensure_future(s.launcher.run_servable(s.service))
        agents, generation = await s.agents()
        for agent in agents:
            agent.send(group.Formed(generation))
        # The loop, which is this thread's, has both to look at in one turn.
        worker = s.service.worker
        said = b""
        while launch.Done.__name__.encode() not in said:
            assert select.select([worker._control], [], [], 30)[0]
            said = worker._control.recv(1 << 16, socket.MSG_PEEK)
        os.kill(worker.pid, signal.SIGKILL)
        assert select.select([worker._pidfd], [], [], 30)[0]
        await start
        _, again = await s.agents()
        assert again.incarnation > generation.incarnation
        assert (
            f"the Worker of servable 'net' version 1 (pid {worker.pid}) ended with code -9; it is respawned"
            in caplog.text
        )


@asynchronous
async def test_to_a_worker_that_is_respawned_one_replica_is_enough(tmp_path):
    """The host of the other may have died long before, and may never come back."""
    async with Setting(tmp_path, replicas=2) as s:
        worker = await s.run()
        os.kill(worker.pid, signal.SIGKILL)
        while s.service.worker is worker or not s.service.worker:
            await asyncio.sleep(0.01)
        # Done when the servable is ready again.
        (respawn,) = s.launcher._tasks
        await s.form(1)
        await respawn


@asynchronous
async def test_of_two_starts_of_one_servable_at_once_one_is_refused(tmp_path):
    """Also where Main has to be started first."""
    s = Setting(tmp_path)
    launcher, options = s.launcher, s.options
    life = asyncio.ensure_future(launcher.run())
    opened, refused = await asyncio.gather(*(launcher.open_servable(options) for _ in range(2)), return_exceptions=True)
    assert (type(refused), str(refused)) == (ConfigError, "servable 'net' version 1 is started already")
    assert list(launcher._services.values()) == [opened]
    launcher.stop()
    await life


@asynchronous
async def test_a_main_that_dies_as_soon_as_it_is_there_is_said_to_have_ended(tmp_path, monkeypatch):
    launcher = Launcher(Settings(max_restarts=1))
    life = asyncio.ensure_future(launcher.run())
    connect = Child.connect

    async def connect_to_the_dead(child):
        os.kill(child.pid, signal.SIGKILL)
        await child.ended.wait()
        await connect(child)

    monkeypatch.setattr(Child, "connect", connect_to_the_dead)
    with pytest.raises(StartError, match=r"^shardserve.main \(pid \d+\) ended with code -9$"):
        await launcher.start_front(lambda number: launch.StartRest(number, "127.0.0.1:1", 1, None))
    await life
    assert "Main died 2 times" in str(launcher.failure)


@asynchronous
async def test_what_is_started_again_while_main_is_restored_is_not_attached_as_it_was(tmp_path):
    async with Setting(tmp_path) as s:
        failing = await s.launcher.open_servable(replace(s.options, version_number=2))
        main = s.launcher._main
        obey, attached = main.order, []

        async def order(message, timeout):
            if isinstance(message, launch.Attach):
                attached.append(message.address)
                if len(attached) == 1:
                    await s.launcher._withdraw(failing)
                    await s.launcher.open_servable(failing.options)
            await obey(message, timeout)

        main.order = order
        await s.launcher._restore_main()
        again = s.launcher._services["net", 2]
        assert attached == [s.service.front_name, again.front_name]


@asynchronous
async def test_a_failed_start_says_why_although_main_died(tmp_path, caplog):
    async with Setting(tmp_path, wait=0.1) as s:
        main = s.launcher._main
        obey = main.order

        def order(message, timeout):
            if isinstance(message, launch.Detach):
                main.kill()
            return obey(message, timeout)

        main.order = order
        with pytest.raises(StartError, match=r"servable 'net': 0 of 2 agents came within"):
            await s.launcher.run_servable(s.service)
        assert s.service.worker is None
        assert all(listener.fileno() == -1 for listener in s.service.listeners)
        assert f"Main could not be told of it: shardserve.main (pid {main.pid}) ended with code -9" in caplog.text
        # Nothing of it is left to be in the way.
        s.service = await s.launcher.open_servable(s.service.options)
        await s.run()


@asynchronous
async def test_main_and_worker_that_can_not_be_started_are_tried_again(tmp_path):
    async with Setting(tmp_path) as s:
        with no_descriptors_left(512):
            worker, main = await s.run(), s.launcher._main
        soft, hard = psutil.Process(worker.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert 512 < soft <= hard
        said = "can't be started: [Errno 24] Too many open files); it is respawned"
        with no_descriptors_left():
            with logged(f"the Worker of servable 'net' version 1 did not start (shardserve.worker {said}") as tried:
                os.kill(worker.pid, signal.SIGKILL)
                await tried.wait()
            with logged(f"Main did not start (shardserve.main {said}") as tried:
                os.kill(main.pid, signal.SIGKILL)
                await tried.wait()
        await s.agents()
        while s.launcher._main is None:
            await asyncio.sleep(0.01)
        assert not s.life.done()


@asynchronous
async def test_nothing_is_started_when_the_launcher_has_ended(tmp_path):
    async with Setting(tmp_path) as s:
        s.launcher.stop()
        await s.life
        stopped = "the server was stopped meanwhile"
        with pytest.raises(StartError, match=stopped):
            await s.launcher.run_servable(s.service)
        with pytest.raises(StartError, match=stopped):
            await s.launcher.open_servable(s.options)
        assert not psutil.Process().children()
