"""Which of the calls that wait go into the next step, and when."""

import asyncio
import time

import pytest
from asynchronous import asynchronous

from shardserve.errors import DeadlineExceeded, Overloaded
from shardserve.settings import Settings
from shardserve.worker.calls import PATIENCE
from shardserve.worker.queue import CallQueue

from .harness import Cluster, value


def in_seconds(seconds):
    return time.monotonic() + seconds


@asynchronous
async def test_nearer_deadlines_first():
    cluster = Cluster(window=1, batch=1)
    cluster.submit(0)
    for number, seconds in ((1, 50), (2, 20), (3, 30)):
        cluster.submit(number, deadline=in_seconds(seconds))
    sent = []
    for step in range(4):
        sent += cluster.steps()[0][1]
        cluster.output(step, [0])
    assert sent == [0, 2, 3, 1]


@asynchronous
async def test_a_call_without_a_deadline_is_overtaken_but_not_for_ever(monkeypatch):
    cluster = Cluster(window=1, batch=1)
    cluster.submit(0)
    cluster.submit(1)
    cluster.submit(2, deadline=in_seconds(PATIENCE / 2))
    cluster.submit(3, deadline=in_seconds(PATIENCE * 2))
    sent = []
    for step in range(4):
        sent += cluster.steps()[0][1]
        cluster.output(step, [0])
    assert sent == [0, 2, 1, 3]


@asynchronous
async def test_the_most_urgent_decides_the_kind_and_the_rest_of_its_kind_fills_the_batch():
    cluster = Cluster(window=1, batch=3)
    cluster.submit(0)
    for number, n, seconds in ((1, 1, 90), (2, 2, 10), (3, 1, 40), (4, 2, 95), (5, 2, 20), (6, 2, 30)):
        cluster.submit(number, n, in_seconds(seconds))
    sent = []
    for step, n in enumerate((1, 2, 1, 2)):
        [(_, values)] = cluster.steps()
        sent.append(values)
        cluster.output(step, values, n=n)
    assert sent == [[0], [2, 5, 6], [3, 1], [4]]


@asynchronous
async def test_a_delay_waits_for_a_full_batch():
    cluster = Cluster(window=2, batch=3, model={"max_batch_delay_ms": 60_000})
    calls = [cluster.submit(i) for i in range(2)]
    assert cluster.steps() == []
    calls.append(cluster.submit(2))
    assert cluster.steps() == [(0, [0, 1, 2])]
    cluster.output(0, [5, 6, 7])
    assert [value(call) for call in calls] == [5, 6, 7]


@asynchronous
async def test_a_delay_ends():
    cluster = Cluster(window=2, batch=3, model={"max_batch_delay_ms": 30})
    began = time.monotonic()
    cluster.submit(0)
    cluster.submit(1)
    assert cluster.steps() == []
    await cluster.sent()
    assert cluster.steps() == [(0, [0, 1])]
    assert time.monotonic() - began >= 0.03


@asynchronous
async def test_a_delay_takes_at_most_half_of_the_time_there_is():
    cluster = Cluster(window=2, batch=3, model={"max_batch_delay_ms": 60_000})
    cluster.submit(0, deadline=in_seconds(0.2))
    await cluster.sent()
    assert cluster.steps() == [(0, [0])]


@asynchronous
async def test_what_runs_again_waits_for_no_delay():
    cluster = Cluster(window=1, batch=2, model={"max_batch_delay_ms": 60_000})
    left = cluster.submit(0)
    cluster.submit(1)
    left.answer.cancel()
    cluster.lose()
    assert cluster.steps() == [(0, [1])]


@asynchronous
async def test_a_kind_whose_delay_is_over_does_not_wait_for_a_more_urgent_one():
    cluster = Cluster(window=2, batch=2, model={"max_batch_delay_ms": 60_000})
    cluster.submit(0, 1, in_seconds(1000))
    for number in (1, 2):
        cluster.submit(number, 2, in_seconds(2000))
    assert cluster.steps() == [(0, [1, 2])]


@asynchronous
async def test_whose_deadline_has_passed_is_answered_and_not_run():
    cluster = Cluster(window=1, batch=4)
    cluster.submit(0)
    late = [cluster.submit(i, deadline=in_seconds(-1)) for i in (1, 2)]
    cluster.submit(3)
    cluster.steps()
    cluster.output(0, [0])
    assert cluster.steps() == [(1, [3])]
    for call in late:
        with pytest.raises(DeadlineExceeded):
            call.answer.result()


@asynchronous
async def test_a_call_that_is_dropped_may_take_others_along():
    """As the calls of one request do: with the first deadline the whole request is over."""
    cluster = Cluster(window=1)
    cluster.submit(0)
    late = [cluster.submit(n, n, in_seconds(-1)) for n in (1, 2, 3)]
    cluster.submit(4, 4)
    for call in late:
        call.answer.add_done_callback(lambda _: [other.answer.cancel() for other in late])
    cluster.steps()
    cluster.output(0, [0])
    assert cluster.steps() == [(1, [4])]
    assert [call.answer.cancelled() for call in late] == [False, True, True]


@asynchronous
async def test_the_bound_counts_all_kinds():
    cluster = Cluster(window=1, settings=Settings(queue_limit=2))
    cluster.submit(0)
    cluster.submit(1, 1)
    left = cluster.submit(2, 2)
    with pytest.raises(Overloaded, match="2 instances wait already"):
        cluster.submit(3, 3)
    left.answer.cancel()
    await asyncio.sleep(0)
    cluster.submit(4, 3)


@asynchronous
async def test_a_call_is_taken_out_whoever_stands_beside_it():
    cluster = Cluster(batch=1)
    queue = CallQueue()
    deadline = in_seconds(9)
    calls = [cluster.call(i, deadline=deadline) for i in range(5)]
    for call in calls:
        queue.add(call)
    queue.discard(calls[3])
    queue.discard(calls[3])
    queue.discard(cluster.call(7))
    assert list(queue) == [calls[0], calls[1], calls[2], calls[4]]
    assert queue.take([cluster.batching]) == [calls[0]]
    assert len(queue) == 3
