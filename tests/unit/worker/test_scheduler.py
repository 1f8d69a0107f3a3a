import asyncio
import time
import weakref

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.errors import DeadlineExceeded, InternalError, Overloaded, StepError, Unavailable
from shardserve.servable import Model, PadRule
from shardserve.settings import Settings
from shardserve.shards.config import DimRange, Signature, TensorSpec
from shardserve.wire.messages import group
from shardserve.worker.answer import Answer
from shardserve.worker.batching import Batching
from shardserve.worker.calls import Call
from shardserve.worker.scheduler import Scheduler

from .harness import Cluster, value


@asynchronous
async def test_calls_wait_for_room_and_then_share_a_batch():
    cluster = Cluster(window=2, batch=3)
    calls = [cluster.submit(i) for i in range(7)]
    # While there is room a call goes at once; the others collect.
    assert cluster.steps() == [(0, [0]), (1, [1])]
    cluster.output(0, [10])
    assert cluster.steps() == [(2, [2, 3, 4])]
    cluster.output(1, [11])
    assert cluster.steps() == [(3, [5, 6])]
    cluster.output(2, [12, 13, 14])
    cluster.output(3, [15, 16])
    assert [value(call) for call in calls] == [10, 11, 12, 13, 14, 15, 16]


@asynchronous
async def test_calls_of_one_key_share_a_batch_wherever_they_stand():
    cluster = Cluster(window=1)
    cluster.submit(0)
    for number, n in enumerate([2, 2, 3, 2], start=1):
        cluster.submit(number, n)
    sent = []
    for number in range(3):
        [(step, values)] = cluster.steps()
        assert step == number
        sent.append(values)
        cluster.output(number, values, n=[1, 2, 3][number])
    assert sent == [[0], [1, 2, 4], [3]]


@asynchronous
async def test_the_group_with_least_under_way_gets_the_next():
    cluster = Cluster(replicas=2, window=2)
    for i in range(5):
        cluster.submit(i)
    assert cluster.steps(0) == [(0, [0]), (1, [2])]
    assert cluster.steps(1) == [(0, [1]), (1, [3])]
    cluster.output(0, [0], replica=1)
    assert cluster.steps(1) == [(2, [4])]


@asynchronous
async def test_deadline_passed_before_the_step():
    cluster = Cluster(window=1)
    cluster.submit(0)
    late = cluster.submit(1, deadline=time.monotonic() - 1)
    good = cluster.submit(2, deadline=time.monotonic() + 1000)
    cluster.steps()
    cluster.output(0, [0])
    assert cluster.steps() == [(1, [2])]
    with pytest.raises(DeadlineExceeded, match=r"passed while the request waited for its step \(0\.\d{3} s\)"):
        late.answer.result()
    cluster.output(1, [2])
    assert value(good) == 2


@asynchronous
async def test_cancelled_calls():
    cluster = Cluster(window=1)
    first, second, third = (cluster.submit(i) for i in range(3))
    second.answer.cancel()
    cluster.steps()
    # Under way: its answer is nobody's.
    first.answer.cancel()
    cluster.output(0, [0])
    assert cluster.steps() == [(1, [2])]
    cluster.output(1, [7])
    assert value(third) == 7


@asynchronous
async def test_step_that_failed_is_its_callers_error():
    cluster = Cluster(window=1)
    bad, good = cluster.submit(1), cluster.submit(2)
    cluster.steps()
    cluster.failure(0, "IndexError: 9")
    with pytest.raises(StepError, match=r"^IndexError: 9$"):
        bad.answer.result()
    # Until the step is drained, it has its place.
    assert cluster.steps() == []
    cluster.output(0, [0])
    assert cluster.steps() == [(1, [2])]
    cluster.output(1, [2])
    assert value(good) == 2


@asynchronous
async def test_merged_batch_that_failed_runs_again_one_by_one():
    cluster = Cluster(window=1)
    calls = [cluster.submit(i) for i in range(4)]
    cluster.output(0, [0])
    cluster.steps()
    cluster.failure(1, "which of them")
    later = cluster.submit(9)
    cluster.output(1, [0, 0, 0])
    for number, sent in enumerate([1, 2, 3], start=2):
        assert cluster.steps() == [(number, [sent])]
        if sent == 2:
            cluster.failure(number, "this one")
        cluster.output(number, [sent])
    assert cluster.steps() == [(5, [9])]
    cluster.output(5, [9])
    assert [value(call) for call in (calls[0], calls[1], calls[3], later)] == [0, 1, 3, 9]
    with pytest.raises(StepError, match=r"^this one$"):
        calls[2].answer.result()


@asynchronous
async def test_calls_of_a_failed_batch_are_replayed_only_once_when_its_generation_ends():
    cluster = Cluster(window=1)
    calls = [cluster.submit(i) for i in range(3)]
    cluster.output(0, [0])
    cluster.failure(1)
    cluster.steps()
    cluster.lose()
    assert cluster.steps() == [(0, [1])]
    assert not any(call.endings for call in calls)
    cluster.output(0, [1])
    assert cluster.steps() == [(1, [2])]
    cluster.output(1, [2])
    assert cluster.steps() == []


@asynchronous
async def test_queue_is_bounded():
    cluster = Cluster(window=1, settings=Settings(queue_limit=2))
    for i in range(3):
        cluster.submit(i)
    with pytest.raises(Overloaded, match=r"2 instances wait already \(queue_limit\)"):
        cluster.submit(3)
    cluster.output(0, [0])
    cluster.submit(4)


@asynchronous
async def test_close():
    cluster = Cluster(window=1)
    under_way, waiting = cluster.submit(0), cluster.submit(1)
    cluster.scheduler.close("the servable is stopped")
    with pytest.raises(Unavailable, match=r"the servable is stopped"):
        waiting.answer.result()
    with pytest.raises(Unavailable, match=r"the servable is stopped"):
        cluster.submit(2)
    cluster.output(0, [5])
    assert value(under_way) == 5


@asynchronous
async def test_what_comes_back_after_close_is_answered():
    cluster = Cluster(window=1)
    cluster.submit(0)
    merged = [cluster.submit(1), cluster.submit(2)]
    cluster.output(0, [0])
    cluster.scheduler.close("rank 0 is given up")
    cluster.groups[0].lost(cluster.agents[0])
    for call in merged:
        with pytest.raises(Unavailable, match=r"rank 0 is given up"):
            call.answer.result()

    cluster = Cluster(window=1)
    cluster.submit(0)
    merged = [cluster.submit(1), cluster.submit(2)]
    cluster.output(0, [0])
    cluster.scheduler.close("rank 0 is given up")
    cluster.failure(1)
    for call in merged:
        with pytest.raises(Unavailable, match=r"rank 0 is given up"):
            call.answer.result()


@asynchronous
async def test_calls_wait_for_the_first_agents_signature():
    cluster = Cluster()
    scheduler = Scheduler([], Settings())
    waiting = asyncio.ensure_future(scheduler.models_known())
    await asyncio.sleep(0)
    assert not waiting.done()
    scheduler.set_models([cluster.batching])
    assert await waiting == [cluster.batching]
    assert await scheduler.models_known() == [cluster.batching]


@asynchronous
async def test_close_ends_the_wait_for_the_first_agent():
    scheduler = Scheduler([], Settings())
    waiting = asyncio.ensure_future(scheduler.models_known())
    await asyncio.sleep(0)
    scheduler.close("rank 1: its shard is missing")
    for wait in (waiting, scheduler.models_known()):
        with pytest.raises(Unavailable, match=r"rank 1: its shard is missing"):
            await wait


@asynchronous
async def test_late_answers_of_an_ended_generation_are_dropped():
    cluster = Cluster(window=1)
    call = cluster.submit(3)
    old, generation = cluster.agents[0], cluster.groups[0].generation
    cluster.lose()
    cluster.groups[0].handle(old, group.Output(generation, 0), None)
    cluster.say(group.Output(generation, 0))
    assert cluster.groups[0].dropped == 2
    assert not call.answer.done()
    cluster.output(0, [8])
    assert value(call) == 8


@asynchronous
async def test_a_batch_never_mixes_subgraphs():
    cluster = Cluster(window=1)
    cluster.scheduler.set_models([cluster.batching, cluster.batching])
    for number, subgraph in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 0)):
        call = cluster.call(number)
        call.subgraph = subgraph
        cluster.scheduler.enqueue(call)
        cluster.scheduler.pump()
    ran = []
    for step in range(3):
        [sent] = cluster.agents[0].stream.take(group.Step)
        [(_, values)] = cluster.steps()
        ran.append((sent.subgraph, values))
        cluster.output(step, values)
    assert ran == [(0, [1]), (0, [2, 5]), (1, [3, 4])]


@asynchronous
async def test_a_call_whose_client_has_left_holds_no_memory_until_its_turn():
    c = Cluster(window=1, batch=1)
    c.submit(0)
    left = [c.submit(i) for i in range(1, 5)]
    stays = c.submit(5)
    for call in left:
        call.answer.cancel()
    arrays = [weakref.ref(call.arrays[0]) for call in left]
    del left, call
    await asyncio.sleep(0)
    assert [reference() for reference in arrays] == [None] * 4
    c.steps()
    c.output(0, [0])
    assert c.steps() == [(1, [5.0])]
    assert not stays.answer.done()


@asynchronous
async def test_a_batch_that_can_not_be_made_fails_its_own_calls(monkeypatch, caplog):
    c = Cluster(window=1)
    c.submit(0)
    call = c.submit(1)

    def has_a_bug(calls):
        raise ZeroDivisionError

    monkeypatch.setattr(c.batching, "make_batch", has_a_bug)
    c.steps()
    c.output(0, [0])
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        call.answer.result()
    monkeypatch.undo()
    after = c.submit(2)
    [(number, values)] = c.steps()
    c.output(number, values)
    assert after.answer.result()[0].tolist() == [2]


@asynchronous
async def test_a_batch_that_there_is_no_memory_for_is_no_bug():
    cluster = Cluster()
    # More than any address space has.
    model = Model(rank_size=1, stage_size=1, pad={"x": PadRule(0, 0.0, multiple=1 << 48)})
    x = TensorSpec("x", "float32", ("batch", "n"))
    batching = Batching(model, Signature({"batch": DimRange(1, 4), "n": DimRange(1, None)}, (x,), (x,)))
    cluster.scheduler.set_models([batching])
    arrays = (np.ones(3, np.float32),)
    call = Call(arrays, batching.key(arrays), None, Answer(), lengths=batching.lengths(arrays))
    cluster.scheduler.enqueue(call)
    cluster.scheduler.pump()
    with pytest.raises(Overloaded, match="no memory for the inputs of a step"):
        call.answer.result()
