"""Ranks that are lost, and generations that end."""

import asyncio

import pytest
from asynchronous import asynchronous

from shardserve.wire.messages import Generation, group

from .harness import Group, batch, until


@asynchronous
async def test_the_death_of_a_rank_that_has_said_that_the_model_raised_is_forgiven():
    g = Group()
    poison = batch()
    g.group.send_step(poison)
    g.say(group.StepFailed, 1, step=0, message="CUDA error: device-side assert triggered")
    g.lose(1)
    assert g.owner.take("forgive") == [(1,)]
    assert g.owner.take("failed") == [(poison, "CUDA error: device-side assert triggered")]
    assert g.owner.take("interrupted") == [([],)]
    # One of another rank isn't, and none of the next generation.
    g.lose(2)
    assert g.owner.take("forgive") == [(1,)]
    g.say(group.Parked, 0, 3)
    g.join(1, 2)
    g.say(group.Formed, 0, 1, 2, 3)
    g.group.send_step(batch())
    g.lose(1)
    assert g.owner.take("forgive") == [(1,)]
    # Once each: what has been forgiven is not the scheduler's to forgive again.
    for ending in g.owner.endings:
        ending.forgive()
    assert g.owner.take("forgive") == [(1,), (2,), (1,)]


@asynchronous
async def test_of_several_ranks_that_have_said_that_the_model_raised_each_death_is_forgiven():
    g = Group()
    g.group.send_step(batch())
    said = "CUDA error: device-side assert triggered"
    for rank in (0, 1):
        g.say(group.StepFailed, rank, step=0, message=said)
    g.lose(1)
    g.lose(0)
    g.say(group.StepFailed, 2, step=0, message=said)
    g.lose(2)
    g.lose(3)
    assert g.owner.take("forgive") == [(1,), (0,), (2,)]


@asynchronous
async def test_the_deaths_of_a_generation_are_forgiven_together_however_it_ended():
    """The kernel that one rank dies in, the others of its stage call with the same input."""
    g = Group()
    g.group.send_step(batch())
    g.lose(0)
    g.lose(1)
    assert g.owner.take("forgive") == []
    g.owner.endings[0].forgive()
    assert g.owner.take("forgive") == [(0,), (1,)]
    # Before it ended itself, as one that hangs and is killed for it.
    g.lose(2)
    assert g.owner.take("forgive") == [(0,), (1,), (2,)]
    # Not any more when all have left.
    g.say(group.Parked, 3)
    g.lose(3)
    assert g.owner.take("forgive") == [(0,), (1,), (2,)]


@asynchronous
async def test_a_rank_that_is_killed_since_it_hung_is_a_death_of_the_generation():
    g = Group(step_timeout=0.01, abort_timeout=0.01)
    g.group.send_step(batch())
    await until(lambda: g.owner.take("kill"))
    g.owner.endings[0].forgive()
    g.lose(3)
    assert g.owner.take("forgive") == [(3,)]


@asynchronous
async def test_a_rank_is_lost_while_agents_are_missing():
    g = Group(serving=False)
    g.join(0, 1)
    g.lose(1)
    assert (g.group.state, sorted(g.group.agents), g.group.endings) == ("waiting", [0], 0)
    g.join(1, 2, 3)
    assert g.group.state == "forming"


@asynchronous
async def test_a_rank_is_lost_while_forming():
    g = Group(serving=False)
    g.join(*range(4))
    g.say(group.Formed, 0, 1)
    g.lose(2)
    assert (g.group.state, g.group.endings) == ("ending", 1)
    assert g.sent(group.End) == [1, 1, 0, 1]
    g.join(2)
    g.say(group.Parked, 0, 1)
    assert g.group.state == "ending"
    g.say(group.Parked, 3)
    assert (g.group.state, g.generation) == ("forming", Generation(5, 2))
    assert g.sent(group.Form) == [2, 2, 1, 2]


@asynchronous
async def test_a_rank_is_lost_while_serving():
    g = Group()
    answered, failed, waiting, last = (batch() for _ in range(4))
    g.group.window = 4
    for each in (answered, failed, waiting, last):
        g.group.send_step(each)
    g.say(group.Output, 2, step=0)
    g.say(group.StepFailed, 2, step=1, message="x")
    old = g.generation
    lost = g.lose(1)
    assert g.group.state == "ending"
    assert g.owner.take("interrupted") == [([waiting, last],)]
    assert g.group.in_flight == 0
    assert [each.stream.take(group.End) for each in g.agents] == [
        [group.End(old)],
        [],
        [group.End(old)],
        [group.End(old)],
    ]
    assert lost.stream.take(group.End) == []
    g.say(group.Parked, 0, 2, 3)
    assert g.group.state == "waiting"
    g.join(1)
    assert g.group.state == "forming"
    assert g.generation > old
    g.say(group.Formed, *range(4))
    g.group.send_step(batch())
    assert g.agents[1].stream.sent[-1].step == 0


@asynchronous
async def test_ranks_are_lost_while_the_generation_ends():
    g = Group()
    g.lose(1)
    g.join(1)
    g.say(group.Parked, 0)
    # One that had parked, then one that had not.
    g.lose(0)
    assert g.group.state == "ending"
    g.lose(2)
    g.say(group.Parked, 3)
    assert (g.group.state, g.group.endings) == ("waiting", 1)
    g.join(0, 2)
    assert g.group.state == "forming"


@asynchronous
async def test_the_last_rank_is_lost():
    g = Group()
    for rank in range(4):
        g.lose(rank)
    assert (g.group.state, g.group.endings, g.group.agents) == ("waiting", 1, {})


@asynchronous
async def test_a_rank_that_was_lost_is_lost_once():
    g = Group()
    lost = g.lose(1)
    g.join(1)
    g.group.lost(lost)
    assert g.group.agents[1] is g.agents[1]


@pytest.mark.parametrize("serving", [False, True])
@asynchronous
async def test_broken_ends_the_generation(serving, caplog):
    g = Group(serving=serving, form_backoff=0.01)
    if serving:
        under_way = batch()
        g.group.send_step(under_way)
    else:
        g.join(*range(4))
    g.say(group.Broken, 3, message="StepMismatch: rank 1 is elsewhere")
    assert g.group.state == "ending"
    assert "replica 0: generation 5.1 ends: rank 3: StepMismatch: rank 1 is elsewhere" in caplog.text
    assert g.owner.take("interrupted") == [([under_way] if serving else [],)]
    # All survive: they park and form anew.
    g.say(group.Broken, 2, message="too")
    g.say(group.Parked, *range(4))
    await until(lambda: g.group.state == "forming")
    assert (g.group.endings, g.group.dropped) == (1, 1)


@asynchronous
async def test_who_does_not_leave_the_generation_is_killed():
    g = Group(abort_timeout=0.05)
    g.lose(1)
    g.say(group.Parked, 0)
    await until(lambda: len(g.owner.take("kill")) == 2)
    text = "did not leave generation 5.1 within 0.05 s"
    assert sorted(g.owner.take("kill")) == [(2, text), (3, text)]
    assert g.group.state == "ending"
    g.lose(2)
    g.lose(3)
    assert g.group.state == "waiting"
    g.join(1, 2, 3)
    assert g.group.state == "forming"


@asynchronous
async def test_who_does_not_join_the_generation_is_killed(caplog):
    g = Group(serving=False, form_timeout=0.05)
    g.join(*range(4))
    g.say(group.Formed, 0, 2)
    await until(lambda: g.group.state == "ending")
    text = "did not join generation 5.1 within 0.05 s"
    assert sorted(g.owner.take("kill")) == [(1, text), (3, text)]
    assert "rank 1, 3 did not join within form_timeout (0.05 s)" in caplog.text
    assert g.sent(group.End) == [1] * 4
    # Killed later for not leaving, too: they are gone only when their connection is.
    g.say(group.Parked, 0, 2)
    assert g.group.state == "ending"
    g.lose(1)
    g.lose(3)
    assert g.group.state == "waiting"


@asynchronous
async def test_step_without_an_answer_ends_the_generation(caplog):
    g = Group(step_timeout=0.05)
    first, second = batch(), batch()
    g.group.send_step(first)
    g.group.send_step(second)
    await until(lambda: g.group.state == "ending")
    assert "step 0 had no answer from rank 2 within step_timeout (0.05 s)" in caplog.text
    assert g.owner.take("interrupted") == [([first, second],)]
    assert g.group.endings == 1


@asynchronous
async def test_timers_of_what_is_over_do_nothing():
    g = Group(step_timeout=0.02, form_timeout=0.02, abort_timeout=0.02)
    g.group.send_step(batch())
    g.say(group.Output, 2, step=0)
    g.lose(1)
    g.say(group.Parked, 0, 2, 3)
    g.join(1)
    g.say(group.Formed, *range(4))
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, passed.set)
    await passed.wait()
    assert (g.group.state, g.group.endings, g.owner.take("kill")) == ("serving", 1, [])
