import asyncio
import dataclasses
import time

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.errors import Aborted, DeadlineExceeded, Overloaded, StepError, Unavailable
from shardserve.servable import add_stage, declare_distributed, declaring, register_method
from shardserve.settings import Settings
from shardserve.wire.messages import group
from shardserve.worker.model_calls import ModelCalls

from .harness import Cluster, agent


def servable():
    with declaring("net") as declared:
        model = declare_distributed(1, 1, stateful=True)

        @register_method("y")
        def predict(x):
            return add_stage(model, x, outputs_count=1)

    return declared


class Setting(Cluster):
    """A stateful servable's method calls, with their steps."""

    def __init__(self, **options):
        super().__init__(**options)
        declared = servable()
        self.models = ModelCalls(declared, self.scheduler)
        self.model = declared.model
        self.turns = {}

    def hold(self, session):
        """As a request does before its first stage."""
        self.turns[session] = asyncio.ensure_future(self.models.hold(session))

    def begin(self, session, value, deadline=None):
        """A step; before the first one, its session has its turn."""
        if session not in self.turns:
            self.hold(session)

        async def step():
            await asyncio.shield(self.turns[session])
            return await self.models.run(self.model, 0, (np.array([value], np.float32),), deadline, session)

        return asyncio.ensure_future(step())


async def turn():
    """Lets the tasks that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynchronous
async def test_a_method_call_holds_its_group_unbatched_until_its_end():
    s = Setting()
    first, second = s.models.session(), s.models.session()
    one = s.begin(first, 1)
    other = s.begin(second, 2)
    await turn()
    assert s.steps() == [(0, [1])]
    s.output(0, [10])
    assert (await one)[0].tolist() == [10]
    assert s.steps() == []
    again = s.begin(first, 3)
    await turn()
    assert s.steps() == [(1, [3])]
    s.output(1, [30])
    assert (await again)[0].tolist() == [30]
    s.models.end(first)
    await turn()
    assert s.steps() == [(2, [2])]
    s.output(2, [20])
    assert (await other)[0].tolist() == [20]


def resets(s):
    return [step.reset for step in s.agents[0].stream.take(group.Step)]


@asynchronous
async def test_the_first_step_of_each_session_resets_what_agents_keep():
    s = Setting()
    for _ in range(2):
        session = s.models.session()
        for number, reset in enumerate((True, False, False)):
            s.agents[0].stream.clear()
            running = s.begin(session, 1)
            await turn()
            assert resets(s) == [reset]
            s.output(s.steps()[0][0], [number])
            await running
        s.models.end(session)


@asynchronous
async def test_a_session_has_no_step_after_one_that_raised():
    s = Setting()
    first, second = s.models.session(), s.models.session()
    calls = [s.begin(first, value) for value in (1, 2)]
    await turn()
    s.failure(0)
    s.output(0, [0])
    with pytest.raises(StepError, match="boom"):
        await calls[0]
    with pytest.raises(Aborted, match="a step of this method call raised, and with it its state is lost: boom"):
        await calls[1]
    with pytest.raises(Aborted, match="boom"):
        await s.begin(first, 3)
    # What it makes of its error is its own affair.
    first.check()
    s.models.end(first)
    other = s.begin(second, 4)
    await turn()
    assert resets(s)[-1]
    s.output(1, [40])
    assert (await other)[0].tolist() == [40]


@asynchronous
async def test_instances_of_one_call_take_a_step_each():
    s = Setting()
    session = s.models.session()
    calls = [s.begin(session, value) for value in (1, 2)]
    await turn()
    assert s.steps() == [(0, [1])]
    s.output(0, [1])
    await turn()
    assert s.steps() == [(1, [2])]
    s.output(1, [2])
    assert [outputs[0].tolist() for outputs in await asyncio.gather(*calls)] == [[1], [2]]


@asynchronous
async def test_each_replica_has_a_holder_of_its_own():
    s = Setting(replicas=2)
    calls = [s.begin(s.models.session(), value) for value in (1, 2, 3)]
    await turn()
    assert [s.steps(0), s.steps(1)] in ([[(0, [1])], [(0, [2])]], [[(0, [2])], [(0, [1])]])
    assert not any(call.done() for call in calls)
    for call in calls:
        call.cancel()


@asynchronous
async def test_the_end_of_a_generation_voids_the_state_of_its_holder_alone():
    s = Setting()
    first, second = s.models.session(), s.models.session()
    running = s.begin(first, 1)
    waiting = s.begin(second, 2)
    await turn()
    s.lose()
    with pytest.raises(Aborted, match="and with it the state of this method call"):
        await running
    await turn()
    assert s.steps()[-1] == (0, [2])
    with pytest.raises(Aborted):
        await s.begin(first, 3)
    with pytest.raises(Aborted):
        first.check()
    s.output(0, [20])
    assert (await waiting)[0].tolist() == [20]
    second.check()


@asynchronous
async def test_a_death_under_a_step_is_forgiven_and_one_between_two_steps_counts():
    """A client whose calls kill their rank, over and over, doesn't have it given up for the others."""
    s = Setting()
    for deaths in range(1, 4):
        running = s.begin(s.models.session(), 1)
        await turn()
        s.lose()
        with pytest.raises(Aborted):
            await running
        assert s.take("forgive") == [(0,)] * deaths
        for session in [*s.turns]:
            s.models.end(session)
    session = s.models.session()
    one = s.begin(session, 1)
    await turn()
    s.output(0, [1])
    await one
    s.lose()
    assert len(s.take("forgive")) == 3


@asynchronous
async def test_a_generation_that_ended_between_two_steps_voids_it_too():
    s = Setting()
    session = s.models.session()
    one = s.begin(session, 1)
    await turn()
    s.output(0, [1])
    await one
    s.lose()
    with pytest.raises(Aborted, match="generation"):
        await s.begin(session, 2)


@asynchronous
async def test_the_end_of_a_generation_before_the_first_step_is_nothing_lost():
    s = Setting()
    first, second = s.models.session(), s.models.session()
    s.hold(first)
    other = s.begin(second, 2)
    await turn()
    s.groups[0].lost(s.agents[0])
    one = s.begin(first, 1)
    await turn()
    s.join()
    # It may have a process for which others would wait with the group, so it comes before them.
    assert s.steps() == [(0, [1])]
    s.output(0, [10])
    assert (await one)[0].tolist() == [10]
    s.models.end(first)
    await turn()
    assert s.steps() == [(1, [2])]
    s.output(1, [20])
    await other


@pytest.mark.parametrize("others_hold", [False, True])
@asynchronous
async def test_a_generation_that_ends_while_the_first_step_is_about_to_be_sent(others_hold):
    """In the turn of the loop between the call and its sending."""
    s = Setting(replicas=1 + others_hold)
    session, other = s.models.session(), s.models.session()
    s.hold(session)
    await turn()
    if others_hold:
        s.hold(other)
        await turn()
    step = s.begin(session, 1)
    while not session.calls:
        await asyncio.sleep(0)
    replica = s.groups.index(session.group)
    s.groups[replica].lost(s.agents[replica])
    s.join(replica)
    await turn()
    await finish_first_step(s, replica, step)


async def two_holders(s):
    """Both have a group and no step yet; then that of the second one is gone."""
    first, second = s.models.session(), s.models.session()
    for session in (first, second):
        s.hold(session)
    await turn()
    replica = s.groups.index(second.group)
    s.groups[replica].lost(s.agents[replica])
    return first, second, replica


def one_more(s):
    """A session that asks for a group."""
    session = s.models.session()
    s.hold(session)
    return session


async def finish_first_step(s, replica, step):
    """It has reached that group, and is answered."""
    assert s.steps(replica) == [(0, [1])]
    s.output(0, [10], replica)
    assert (await step)[0].tolist() == [10]


@asynchronous
async def test_whoever_lost_its_group_before_the_first_step_has_its_next_generation_and_waits_for_no_other_holder():
    """That one may wait for the process of this one's Python stage."""
    s = Setting(replicas=2)
    holder, loser, replica = await two_holders(s)
    newcomer = one_more(s)
    one = s.begin(loser, 1)
    await turn()
    assert not one.done()
    s.join(replica)
    await turn()
    # The other has made no step, and nobody has left: this was its own.
    assert newcomer.group is None
    await finish_first_step(s, replica, one)
    s.models.end(loser)
    await turn()
    assert newcomer.group is s.groups[replica]
    holder.check()


@asynchronous
async def test_nobody_takes_the_next_generation_of_a_holder_that_makes_its_first_step_later():
    s = Setting(replicas=2)
    _, loser, replica = await two_holders(s)
    newcomer = one_more(s)
    s.join(replica)
    await turn()
    assert newcomer.group is None
    one = s.begin(loser, 1)
    await turn()
    await finish_first_step(s, replica, one)
    # From here on its state would be lost.
    s.lose(replica)
    with pytest.raises(Aborted, match="generation"):
        await s.begin(loser, 2)


@asynchronous
async def test_whoever_lost_its_group_before_the_first_step_takes_one_that_is_free():
    s = Setting(replicas=2)
    holder, loser, replica = await two_holders(s)
    one = s.begin(loser, 1)
    await turn()
    s.models.end(holder)
    await turn()
    await finish_first_step(s, 1 - replica, one)
    newcomer = one_more(s)
    s.join(replica)
    await turn()
    assert newcomer.group is s.groups[replica]


@asynchronous
async def test_whoever_lost_its_group_before_the_first_step_hears_that_it_will_not_come_back():
    s = Setting(replicas=2, settings=Settings(max_formings=1))
    _, loser, replica = await two_holders(s)
    one = s.begin(loser, 1)
    await turn()
    newcomer = s.agents[replica] = dataclasses.replace(agent(0, 1, 1), rank=replica)
    s.groups[replica].add(newcomer)
    assert not one.done()
    s.say(group.Broken(s.groups[replica].generation, "no memory"), replica)
    with pytest.raises(Unavailable, match=f"replica {replica} could not form, 1 times in a row: .*no memory"):
        await one
    loser.check()


@asynchronous
async def test_a_holder_that_leaves_during_its_step_frees_the_group_when_the_step_has_ended():
    s = Setting()
    first, second = s.models.session(), s.models.session()
    one, _ = s.begin(first, 1), s.begin(second, 2)
    await turn()
    one.cancel()
    s.models.end(first)
    await turn()
    assert s.steps() == [(0, [1])]
    s.output(0, [1])
    await turn()
    assert s.steps() == [(1, [2])]


@asynchronous
async def test_those_that_wait_are_bounded_have_deadlines_and_hear_of_the_end():
    s = Setting(settings=Settings(queue_limit=2))
    holder = s.begin(s.models.session(), 1)
    late = s.begin(s.models.session(), 2, deadline=time.monotonic() + 0.01)
    waiting = s.begin(s.models.session(), 3)
    with pytest.raises(Overloaded, match=r"2 method calls wait for a group already \(queue_limit\)"):
        await s.begin(s.models.session(), 4)
    await asyncio.sleep(0.02)
    held = next(iter(s.scheduler._sessions._holding))
    s.output(0, [1])
    await holder
    s.models.end(held)
    with pytest.raises(DeadlineExceeded):
        await late
    s.scheduler.close("stopped")
    with pytest.raises(Unavailable, match="stopped"):
        await s.begin(s.models.session(), 5)
    waiting.cancel()


@asynchronous
async def test_a_servable_without_state_has_no_sessions():
    with declaring("net") as declared:
        declare_distributed(1, 1)
    assert ModelCalls(declared, Cluster().scheduler).session() is None


@asynchronous
async def test_a_first_step_that_could_not_be_made_ends_the_method_call(monkeypatch):
    """It would have put back what the call before has left."""
    s = Setting()
    session = s.models.session()

    def refuse(calls):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(s.scheduler.known_models[0], "make_batch", refuse)
        with pytest.raises(Overloaded, match="no memory"):
            await s.begin(session, 1)
    with pytest.raises(Aborted):
        await s.begin(session, 2)
    assert s.steps() == []
    s.models.end(session)
    following = s.models.session()
    call = s.begin(following, 3)
    await turn()
    assert resets(s) == [True]
    call.cancel()
