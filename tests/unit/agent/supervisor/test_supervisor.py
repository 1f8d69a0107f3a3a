import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from asynchronous import asynchronous

from shardserve.errors import Unavailable
from shardserve.wire.messages import group

from ..scripted import HOST, Host, ScriptedWorker, logged, no_descriptors_left, output, send_step
from ..shards import write_shards

pytestmark = pytest.mark.usefixtures("nothing_left")


@asynchronous
async def test_agents_are_registered_watched_and_forked_anew(tmp_path, ports, caplog):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        supervisor = await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        assert [agent.register.rank for agent in agents] == [0, 1]
        assert [agent.register.stage_address for agent in agents] == [f"{HOST}:{ports[1] + i}" for i in range(2)]
        assert {agent.register.device for agent in agents} == {"cpu"}
        assert not host.ready.done()
        supervisor.send(group.HostReady())
        loaded = await host.ready
        assert loaded.size == sum(Path(model).with_name("weights.safetensors").stat().st_size for model in models)
        assert "MB of weights loaded in " in str(loaded)

        os.kill(agents[1].register.pid, signal.SIGKILL)
        [reborn] = await worker.agents(1)
        assert reborn.register.rank == 1
        assert reborn.register.pid != agents[1].register.pid
        died = f"pid {agents[1].register.pid} died of SIGKILL"
        assert f"servable 'net' version 1: rank 1 is forked anew: {died}" in caplog.messages

        # Told to, it kills; but only the process that was meant.
        supervisor.send(group.Kill(0, agents[0].register.pid + 1, "did nothing"))
        supervisor.send(group.Kill(0, agents[0].register.pid, "did not leave"))
        [reborn] = await worker.agents(1)
        assert reborn.register.rank == 0
        assert f"rank 0 (pid {agents[0].register.pid}) is killed: it did not leave" in caplog.text


@asynchronous
async def test_a_stopped_process_is_killed_all_the_same(tmp_path, ports):
    models = write_shards(tmp_path, 1)
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1]):
        supervisor = await worker.supervisor(0)
        [agent] = await worker.agents(1)
        os.kill(agent.register.pid, signal.SIGSTOP)
        supervisor.send(group.Kill(0, agent.register.pid, "is silent"))
        await agent.lost.wait()
        await worker.agents(1)


@asynchronous
async def test_a_process_that_is_gone_already_may_be_killed(tmp_path, ports):
    models = write_shards(tmp_path, 1)
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0)
        [agent] = await worker.agents(1)
        process = psutil.Process(agent.register.pid)
        process.kill()
        # The loop, which is this thread's, hears of the death only when it is over.
        while psutil.pid_exists(process.pid):
            process.wait(30)
        host.supervisor._frame(group.Kill(0, process.pid, "is silent"), None)
        await worker.agents(1)


@asynchronous
async def test_another_fork_server_is_started_when_one_dies(tmp_path, ports, caplog):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]):
        await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        parents = {psutil.Process(agent.register.pid).ppid() for agent in agents}
        [server] = parents
        os.kill(server, signal.SIGKILL)
        again = await worker.agents(2)
        assert [agent.register.rank for agent in again] == [0, 1]
        assert psutil.Process(again[0].register.pid).ppid() != server
        said = f"servable 'net' version 1: the fork server (pid {server}) died of SIGKILL; starting another"
        assert said in caplog.messages
        generation = await worker.form(again)
        send_step(again, generation, 0, np.ones((1, 3), np.float32))
        await again[0].next(group.Output)
        assert (output(again[0], (1, 3)) == 2).all()


@asynchronous
async def test_another_fork_server_is_started_when_one_freezes(tmp_path, ports, caplog):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        server = psutil.Process(agents[1].register.pid).parent()
        server.suspend()
        # So that the test doesn't wait for the 60 s, which a new one may need.
        ask = host.supervisor._agents._fork_server._ask
        host.supervisor._agents._fork_server._ask = lambda *request: ask(*request[:-1], 0.2)
        os.kill(agents[1].register.pid, signal.SIGKILL)
        again = await worker.agents(2)
        assert [agent.register.rank for agent in again] == [0, 1]
        assert not {agent.register.pid for agent in agents} & {agent.register.pid for agent in again}
        said = f"the fork server (pid {server.pid}) did not answer within 0.2 s (start_timeout) and was killed"
        assert f"{said}; starting another" in caplog.text


@asynchronous
async def test_another_fork_server_is_started_when_the_first_takes_too_long(tmp_path, ports, caplog):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        server = await host.fork_server()
        # So that it is never done, and the test doesn't wait for the 60 s.
        psutil.Process(server.pid).suspend()
        ask = server._ask
        server._ask = lambda *request: ask(*request[:-1], 0.2)
        await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        assert [agent.register.rank for agent in agents] == [0, 1]
        assert f"the fork server (pid {server.pid}) did not answer within 0.2 s (start_timeout)" in caplog.text


@asynchronous
async def test_another_fork_server_that_can_not_be_started_is_tried_again(tmp_path, ports):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        server = psutil.Process(agents[1].register.pid).ppid()
        said = "rank 1 is forked anew: shardserve.agent.fork_server can't be started: [Errno 24] Too many open files"
        with no_descriptors_left(), logged(said) as tried:
            os.kill(server, signal.SIGKILL)
            await tried.wait()
        again = await worker.agents(2)
        assert [agent.register.rank for agent in again] == [0, 1]
        assert not host.life.done()


@asynchronous
async def test_a_rank_that_dies_too_often_is_given_up(tmp_path, ports, caplog):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1], max_restarts=2) as host:
        supervisor = await worker.supervisor(0, 1)
        agents = await worker.agents(2)
        supervisor.send(group.HostReady())
        victim = agents[1]
        for _ in range(2):
            os.kill(victim.register.pid, signal.SIGKILL)
            [victim] = await worker.agents(1)
        os.kill(victim.register.pid, signal.SIGKILL)
        given_up = await supervisor.next(group.GaveUp)
        assert given_up.rank == 1
        last = f"the last time: pid {victim.register.pid} died of SIGKILL"
        assert given_up.reason == f"rank 1: died 3 times within 60 s; {last}"
        said = f"servable 'net' version 1: rank 1 is not forked again: died 3 times within 60 s; {last}"
        assert said in caplog.messages
        # The others of this host go on.
        assert not agents[0].lost.is_set()
        assert not host.life.done()


@asynchronous
async def test_a_death_that_is_forgiven_before_its_reason_is_known(tmp_path, ports):
    """The Worker sees it at once; how it ended the fork server is asked for first."""
    models = write_shards(tmp_path, 1)
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1], max_restarts=0) as host:
        supervisor = await worker.supervisor(0)
        [agent] = await worker.agents(1)
        supervisor.send(group.HostReady())
        await host.ready
        server = host.supervisor._agents._fork_server
        ending_of = server.ending_of

        async def asked(pid, timeout):
            host.supervisor._frame(group.Forgive(0), None)
            return await ending_of(pid, timeout)

        server.ending_of = asked
        os.kill(agent.register.pid, signal.SIGKILL)
        [reborn] = await worker.agents(1)
        os.kill(reborn.register.pid, signal.SIGKILL)
        server.ending_of = ending_of
        assert (await supervisor.next(group.GaveUp)).rank == 0


@asynchronous
async def test_config_given_apart_from_the_model(tmp_path, ports):
    models = write_shards(tmp_path)
    configs = []
    for rank in range(2):
        configs.append(str(tmp_path / f"config{rank}.json"))
        os.rename(tmp_path / f"device{rank}" / "group_config.json", configs[-1])
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1], configs=configs):
        await worker.supervisor(0, 1)
        await worker.agents(2)


@asynchronous
async def test_the_second_replica_takes_the_same_shards(tmp_path, ports):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models * 2, ports[1]):
        await worker.supervisor(0, 1, 2, 3)
        agents = await worker.agents(4)
        assert [agent.register.configs[0]["rank"] for agent in agents] == [0, 1, 0, 1]


@asynchronous
async def test_an_agent_that_is_to_come_again_does(tmp_path, ports, caplog):
    models = write_shards(tmp_path, 1)
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1]) as host:
        supervisor = await worker.supervisor(0)
        early = await worker.arrived.get()
        first = await early.next(group.Register)
        early.send(group.Refuse("Unavailable", "rank 0: is already there (pid 7 on 127.0.0.1)"))
        [agent] = await worker.agents(1)
        # By the supervisor's name the Worker knows whose agents they are.
        assert agent.register.supervisor == first.supervisor == host.supervisor._name
        assert "rank 0 is forked anew: is already there (pid 7 on 127.0.0.1)" in caplog.text
        supervisor.send(group.HostReady())
        await host.ready


@asynchronous
async def test_who_says_its_address_does_not_look_for_it(tmp_path, ports):
    models = write_shards(tmp_path)
    worker = ScriptedWorker(ports[0], 2)
    async with worker, Host(ports[0], models, ports[1], agent_ip="10.9.9.9", rank_start=4):
        _, enlist = await worker.introduced()
        assert enlist == group.Enlist((), "10.9.9.9", 4, 2)


@asynchronous
async def test_stopped_before_a_worker_came(tmp_path, ports):
    models = write_shards(tmp_path)
    async with Host(ports[0], models, ports[1]) as host:
        pass
    with pytest.raises(Unavailable, match=r"stopped before all agents were registered"):
        host.ready.result()


@asynchronous
async def test_agents_leave_when_they_are_told(tmp_path, ports):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        supervisor, agents = await worker.ready(host, 0, 1)
        for peer in (*agents, supervisor):
            peer.send(group.Exit("the servable is stopped"))
        await host.life
        for peer in (*agents, supervisor):
            await peer.lost.wait()


@asynchronous
async def test_agents_that_do_not_leave_are_killed(tmp_path, ports, caplog):
    models = write_shards(tmp_path, 1)
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1], exit_timeout=0.3) as host:
        supervisor = await worker.supervisor(0)
        [agent] = await worker.agents(1)
        os.kill(agent.register.pid, signal.SIGSTOP)
        supervisor.send(group.Exit("the servable is stopped"))
        await host.life
        assert "agents did not leave within 0.3 s and are killed" in caplog.text
        await agent.lost.wait()
        with pytest.raises(Unavailable, match=r"the servable was stopped"):
            host.ready.result()
