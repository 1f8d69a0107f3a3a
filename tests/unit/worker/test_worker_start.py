"""A Worker that waits for its agents, and what it says when they don't come."""

import asyncio

import pytest
from asynchronous import asynchronous

from shardserve.errors import ConfigError, RankTableError
from shardserve.wire.messages import Generation, front, group, launch

from .scene import SERVABLE, STATEFUL, Scene, infer, state
from .test_registry import config

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_wrong_declarations(tmp_path, free_port):
    async def body():
        with pytest.raises(ConfigError, match=rf"{tmp_path}/net/servable_config.py, line 1: NameError: name 'non"):
            Scene(tmp_path, free_port, servable="nonsense")
        broken = SERVABLE.replace("rank_size=2", "rank_size=4")
        said = rf"rank table {tmp_path}/ranks.json: \$ has 2 ranks; the servable declares rank_size=4, stage_size=1"
        with pytest.raises(RankTableError, match=said):
            Scene(tmp_path, free_port, servable=broken)

    asyncio.run(body())


@asynchronous
async def test_wait_agents_time(tmp_path, free_port):
    async with Scene(tmp_path, free_port, replicas=2, wait=0.3) as scene:
        await (await scene.agent(2)).next(group.Registered)
        [refused] = await scene.said(launch.Refused)
        assert refused.order == 1
        assert refused.error == "StartError"
        assert refused.message == (
            "servable 'net': 1 of 4 agents came within wait_agents_time_in_seconds=0.3; missing: rank 0, 1, 3"
        )


@asynchronous
async def test_agents_that_came_in_time(tmp_path, free_port):
    async with Scene(tmp_path, free_port, wait=0.5) as scene:
        await scene.agents(0, 1)
        await scene.said(launch.Done)
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.6, passed.set)
        await passed.wait()
        assert scene.launcher.take(launch.Refused) == []


@asynchronous
async def test_a_start_goes_on_whose_agents_have_come_in_time(tmp_path, free_port):
    """What else it waits for, a group or the processes of Python stages, has limits of its own."""
    async with Scene(tmp_path, free_port, wait=0.2) as scene:
        agents = [await scene.agent(rank) for rank in range(2)]
        forms = [await agent.next(group.Form) for agent in agents]
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, passed.set)
        await passed.wait()
        assert scene.launcher.take(launch.Refused) == []
        for agent, form in zip(agents, forms, strict=True):
            agent.send(group.Formed(form.generation))
        await scene.said(launch.Done)


@asynchronous
async def test_incarnation_is_greater_than_any_agents(tmp_path, free_port):
    async with Scene(tmp_path, free_port, incarnation=100) as scene:
        agents = [await scene.agent(0, incarnation=100), await scene.agent(1, incarnation=170)]
        assert await scene.said(launch.Incarnation) == [launch.Incarnation(171)]
        assert await agents[0].next(group.Registered) == group.Registered(100)
        assert await agents[1].next(group.Registered) == group.Registered(171)
        for agent in agents:
            assert (await agent.next(group.Form)).generation == Generation(171, 1)


@asynchronous
async def test_a_start_waits_for_others_in_the_place_of_agents_that_gave_up(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        main.send(*infer(5))
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(1, "model/w: No such file"))
        announced = await state(main, "failed")
        assert announced.reason == announced.replicas[0].reason == "rank 1: model/w: No such file"
        failed = await main.next(front.Failed)
        assert (failed.error, failed.message) == ("Unavailable", "rank 1: model/w: No such file")
        assert scene.launcher.take(launch.Waiting)[-1] == launch.Waiting(2, (0, 1), "rank 1: model/w: No such file")
        assert caplog.messages.count("replica 0 waits for other agents: rank 1: model/w: No such file") == 1
        assert not scene.launcher.take(launch.Refused)
        await scene.agents(0, 1)
        assert (await state(main, "ready")).replicas[0].reason == ""
        assert await scene.said(launch.Done)


@asynchronous
async def test_a_start_that_waited_long_enough_says_why_agents_gave_up(tmp_path, free_port):
    async with Scene(tmp_path, free_port, wait=0.2) as scene:
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(1, "model/w: No such file"))
        [refused] = await scene.said(launch.Refused)
        assert refused.message.endswith("missing: rank 0, 1; rank 1: model/w: No such file")


@asynchronous
async def test_a_first_agent_that_does_not_fit_the_methods_does_not_end_the_start(tmp_path, free_port, caplog):
    two_inputs = SERVABLE.replace("predict(x)", "predict(x, z)").replace("model, x,", "model, x, z,")
    async with Scene(tmp_path, free_port, servable=two_inputs) as scene:
        refused = await (await scene.agent(0)).next(group.Refuse)
        assert refused.message == "method 'predict' gives the model 2 inputs; its shards take 1"
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(0, refused.message))
        while not any(said.reason for said in await scene.said(launch.Waiting)):
            await asyncio.sleep(0.005)
        assert not scene.launcher.take(launch.Refused)
        assert [record.message for record in caplog.records if refused.message in record.message] == [
            f"replica 0 waits for other agents: rank 0: {refused.message}"
        ]


@asynchronous
async def test_agents_that_stay_away_are_waited_for_in_status_and_log(tmp_path, free_port, caplog):
    all_four = "waits for agents: 0 of 4 are there, missing ranks 0-3"

    async def reasons(main, wanted):
        """When the servable, or a replica, has this reason: the servable's state and all reasons."""
        while True:
            said = await main.next(front.Announce)
            found = [said.state, said.reason, *(replica.reason for replica in said.replicas)]
            if wanted in found:
                return found

    async def logged(text):
        while text not in caplog.messages:
            await asyncio.sleep(0.005)

    async with Scene(tmp_path, free_port, replicas=2, waiting_notice=0.05) as scene:
        main = await scene.main()
        first, second = (f"waits for agents: 0 of 2 are there, missing ranks {ranks}" for ranks in ("0-1", "2-3"))
        assert await reasons(main, all_four) == ["starting", all_four, first, second]
        _, agents = await scene.agents(0, 1)
        generation, others = await scene.agents(2, 3)
        assert await reasons(main, "ready") == ["ready", "", "", ""]

        # The other replica goes on.
        others[1].stream.abort()
        await others[0].next(group.End)
        others[0].send(group.Parked(generation))
        one = "waits for agents: 1 of 2 is there, missing rank 3"
        assert await reasons(main, one) == ["ready", "", "", one]
        await logged("waits for agents: 3 of 4 are there, missing rank 3")

        for agent in (*agents, others[0]):
            agent.stream.abort()
        assert await reasons(main, all_four) == ["recovering", all_four, first, second]
        await logged(all_four)

        reminder = scene.worker._reminder
        await scene.agents(0, 1)
        assert await reasons(main, "ready") == ["ready", "", "", second]
        assert not reminder.done()
        await scene.agents(2, 3)
        await asyncio.wait([reminder])
        assert reminder.cancelled()
        assert scene.worker._reminder is None


@asynchronous
async def test_a_worker_that_was_respawned_is_ready_with_one_replica_and_its_python_stages(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port, replicas=2, servable=STATEFUL, was_ready=True, waiting_notice=0.05) as scene:
        main = await scene.main()
        assert (await main.next(front.Announce)).state == "recovering"
        await scene.agents(0, 1)
        loading = await main.next(front.Announce)
        while not loading.reason.startswith("its Python"):
            assert (loading.state, scene.worker._python_stages.ready) == ("recovering", False)
            loading = await main.next(front.Announce)
        await state(main, "ready")
        assert scene.worker._python_stages.ready
        assert await scene.said(launch.Done) == [launch.Done(1)]
        # Until then it was the launcher's to say.
        text = "waits for agents: 2 of 4 are there, missing ranks 2-3"
        assert text not in caplog.messages
        while text not in caplog.messages:
            await asyncio.sleep(0.005)
        await scene.worker.stop()


@asynchronous
async def test_what_a_rank_was_refused_for_is_said_as_long_as_it_is_so(tmp_path, free_port):
    async with Scene(tmp_path, free_port, replicas=2) as scene:
        main = await scene.main()

        async def reason(wanted):
            while not (await main.next(front.Announce)).replicas[1].reason.startswith(wanted):
                pass

        async def leave(*peers):
            for peer in peers:
                peer.stream.close()
                await peer.lost.wait()

        supervisor = await scene.supervisor(count=4)
        _, agents = await scene.agents(0, 1)
        other = config(0, export_id="f" * 32)
        refused = await (await scene.agent(2, other)).next(group.Refuse)
        assert refused.message.startswith("rank 2: its shard is of export ffff")
        for rank in (2, 3):
            supervisor.send(group.GaveUp(rank, refused.message))
        await reason(refused.message)
        await leave(*agents)
        await reason(
            "rank 2: did not fit agents that have left, and its startup_agents (pid 55) does not fork it again"
        )
        await leave(supervisor)
        await reason("waits for agents: 0 of 2 are there, missing ranks 2-3")
        _, agents = await scene.agents(0, 1)
        await reason(refused.message)
        await leave(*agents)
        await reason("waits for agents: 0 of 2 are there, missing ranks 2-3")
        await scene.agent(0, other)
        await scene.agent(1, config(1, export_id="f" * 32))
        while (announced := await main.next(front.Announce)).replicas[0].state == "waiting":
            assert announced.replicas[1].reason.startswith("waits for agents")
        assert announced.replicas[1].reason == "waits for agents: 0 of 2 are there, missing ranks 2-3"


@asynchronous
async def test_a_reason_that_names_its_rank_is_said_as_it_is(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(1, "rank 1, subgraph 0: its shard is damaged"))
        assert (await state(main, "failed")).reason == "rank 1, subgraph 0: its shard is damaged"
