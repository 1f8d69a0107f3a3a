"""What a Worker records of its steps and gathers from its agents."""

import asyncio
import time

import pytest
from asynchronous import asynchronous

from shardserve.wire.messages import front, group
from shardserve.wire.messages.times import RankTimes, StepNames

from .harness import Cluster, Group, batch
from .scene import Scene

pytestmark = pytest.mark.usefixtures("nothing_left")
NOTHING = RankTimes(StepNames([], [], []), [], [], [], [])
ONE = RankTimes(StepNames([100], [1], [0]), [1.0], [1.5], [2.0], [3.0])


@asynchronous
async def test_a_step_from_its_oldest_call_to_its_answer():
    cluster = Cluster(window=1)
    calls = [cluster.submit(i) for i in (1.0, 2.0, 3.0)]
    # The first goes alone, the others together.
    cluster.output(0, [1.0])
    cluster.output(1, [2.0, 3.0])
    times = cluster.groups[0].timeline.times()
    assert (times.names.incarnations, times.names.counters, times.names.steps) == ([5, 5], [1, 1], [0, 1])
    assert times.instances == [1, 2]
    assert [times.dims[form] for form in times.forms] == [{"batch": 1, "n": 1}, {"batch": 2, "n": 1}]
    assert times.queued == [calls[0].arrived, calls[1].arrived]
    for queued, sent, answered in zip(times.queued, times.sent, times.answered, strict=True):
        assert queued <= sent <= answered
    assert times.answered[0] <= times.sent[1]
    assert (times.failed, times.ended) == ([False] * 2, [False] * 2)


@asynchronous
async def test_steps_that_fail_and_that_are_cut_short():
    each = Group()
    for _ in range(2):
        each.group.send_step(batch())
    each.say(group.StepFailed, 1, step=0, message="no")
    each.say(group.Output, 2, step=0)
    each.lose(3)
    times = each.group.timeline.times()
    assert times.names.steps == [0, 1]
    assert (times.failed, times.ended) == ([True, False], [False, True])
    assert times.dims == [{"batch": 2}]
    assert times.sent[1] <= times.answered[1]


@asynchronous
async def test_only_the_last_steps_are_kept():
    each = Group(timeline_steps=2)
    for step in range(5):
        each.group.send_step(batch())
        each.say(group.Output, 2, step=step)
    assert each.group.timeline.times().names.steps == [3, 4]


@asynchronous
async def test_agents_are_asked_and_main_is_told(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        _, agents = await scene.agents(0, 1)
        main = await scene.main()
        main.send(front.AskTimeline(9, time.monotonic() + 60))
        for agent in agents:
            asked = await agent.next(group.AskTimes)
            agent.send(group.Clock(asked.request, 1e9))
            agent.send(group.Times(asked.request, ONE))
        assert (await main.next(front.ReplicaTimeline)).replica == 0
        ranks = [await main.next(front.RankTimeline) for _ in agents]
        assert sorted(rank.rank for rank in ranks) == [0, 1]
        for rank in ranks:
            assert (rank.request, rank.stage, rank.host, rank.pid) == (9, 0, "127.0.0.1", 1000 + rank.rank)
            assert rank.times == ONE
            # Through a Unix socket: there is one clock, whatever is said.
            assert (rank.offset, rank.error) == (0.0, 0.0)
        end = await main.next(front.TimelineEnd)
        assert (end.request, end.capacity, end.missing) == (9, 4096, ())


@asynchronous
async def test_the_clock_of_another_host(tmp_path, free_port):
    async with Scene(tmp_path, free_port, insecure=True) as scene:
        loop = asyncio.get_running_loop()
        agents = [await scene.agent_by_tcp(0), await scene.agent(1)]
        for agent in agents:
            agent.send(group.Formed((await agent.next(group.Form)).generation))
        main = await scene.main()
        before = loop.time()
        main.send(front.AskTimeline(1, time.monotonic() + 60))
        asked = await agents[0].next(group.AskTimes)
        agents[0].send(group.Clock(asked.request, before + 500))
        agents[0].send(group.Times(asked.request, ONE))
        rank = await main.next(front.RankTimeline)
        took = loop.time() - before
        assert 0 < rank.error <= took / 2
        assert 500 - took <= rank.offset <= 500


@asynchronous
async def test_a_rank_that_says_nothing_and_one_that_leaves_are_missing(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        _, agents = await scene.agents(0, 1)
        main = await scene.main()
        main.send(front.AskTimeline(1, time.monotonic() + 0.2))
        late = await agents[0].next(group.AskTimes)
        await agents[1].next(group.AskTimes)
        agents[1].stream.abort()
        assert (await main.next(front.TimelineEnd)).missing == (0, 1)
        agents[0].send(group.Times(late.request, ONE))
        main.send(front.AskTimeline(2, time.monotonic() + 60))
        asked = await agents[0].next(group.AskTimes)
        agents[0].send(group.Times(asked.request, NOTHING))
        assert (await main.next(front.RankTimeline)).request == 2
        assert (await main.next(front.TimelineEnd)).missing == ()
