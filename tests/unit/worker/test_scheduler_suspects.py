"""What was under way when a generation ended: replayed, taken apart, given up."""

import time
from random import Random

import pytest
from asynchronous import asynchronous

from shardserve.errors import Aborted
from shardserve.wire.frames import FrameError

from .harness import Cluster, value


@asynchronous
async def test_suspects_run_again_as_the_batches_that_they_were_each_alone_in_its_window():
    cluster = Cluster(window=2, batch=3)
    calls = [cluster.submit(i) for i in range(5)]
    cluster.output(0, [0])
    # Under way: 1, and 2 to 4; 5 waits.
    calls.append(cluster.submit(5))
    cluster.lose()
    assert [len(call.endings) for call in calls] == [0, 1, 1, 1, 1, 0]
    assert cluster.steps() == [(0, [1])]
    cluster.output(0, [11])
    assert cluster.steps() == [(1, [2, 3, 4])]
    cluster.output(1, [12, 13, 14])
    assert cluster.steps() == [(2, [5])]
    # That was no suspect: others may join it.
    calls.append(cluster.submit(6))
    assert cluster.steps() == [(3, [6])]
    cluster.output(2, [15])
    cluster.output(3, [16])
    assert [value(call) for call in calls] == [0, 11, 12, 13, 14, 15, 16]


@asynchronous
async def test_a_batch_under_which_a_second_generation_ends_is_taken_apart_and_only_the_one_at_fault_is_given_up():
    cluster = Cluster(window=1, batch=3)
    cluster.submit(0)
    calls = [cluster.submit(i) for i in (1, 2, 3)]
    cluster.output(0, [0])
    later = cluster.submit(4)
    cluster.lose()
    assert cluster.steps() == [(0, [1, 2, 3])]
    cluster.lose()
    assert cluster.steps() == [(0, [1])]
    cluster.output(0, [11])
    assert cluster.steps() == [(1, [2])]
    assert cluster.take("forgive") == []
    cluster.lose()
    # All three deaths were its fault.
    assert cluster.take("forgive") == [(0,)] * 3
    assert cluster.steps() == [(0, [3])]
    cluster.output(0, [13])
    assert cluster.steps() == [(1, [4])]
    cluster.output(1, [14])
    assert [value(call) for call in (calls[0], calls[2], later)] == [11, 13, 14]
    with pytest.raises(Aborted, match=r"^3 generations of the group ended while this request ran$"):
        calls[1].answer.result()


@asynchronous
async def test_of_a_batch_of_suspects_those_whose_clients_have_left_do_not_run():
    cluster = Cluster(window=1, batch=3)
    cluster.submit(0)
    calls = [cluster.submit(i) for i in (1, 2, 3)]
    cluster.output(0, [0])
    cluster.groups[0].lost(cluster.agents[0])
    calls[1].answer.cancel()
    cluster.join()
    assert cluster.steps() == [(0, [1, 3])]
    # The model raises on one of the suspects: each has a step of its own, and still the window for itself.
    cluster.failure(0)
    assert cluster.steps() == []
    cluster.output(0, [0, 0])
    assert cluster.steps() == [(1, [1])]
    cluster.lose()
    with pytest.raises(Aborted, match=r"^2 generations"):
        calls[0].answer.result()
    assert cluster.steps() == [(0, [3])]


def full_windows(cluster, waiting):
    """Calls until each window is full of the largest batches, and `waiting` more; how many there are."""
    window, batch = cluster.groups[0].window, cluster.batching.max_size
    count = len(cluster.groups) * window * (1 + batch) + waiting
    for i in range(count):
        cluster.submit(i)
    for number in range(window):
        for replica in range(len(cluster.groups)):
            cluster.output(number, [0], replica)
    for replica, replica_group in enumerate(cluster.groups):
        assert [len(values) for _, values in cluster.steps(replica)[window:]] == [batch] * window
        assert replica_group.in_flight == window


@asynchronous
async def test_a_call_with_a_near_deadline_does_not_wait_for_all_the_suspects_of_a_dead_replica():
    cluster = Cluster(replicas=2, window=3, batch=32)
    full_windows(cluster, waiting=40)
    cluster.groups[0].lost(cluster.agents[0])
    urgent = cluster.submit(9999, deadline=time.monotonic() + 5)
    ended = []
    while not urgent.answer.done():
        number, step = next(iter(cluster.groups[1]._steps.items()))
        ended.append(len(step.batch.calls))
        cluster.output(number, [0] * len(step.batch.calls), replica=1)
    # What was under way here, one batch of suspects, and its own.
    assert ended[:4] == [32] * 4
    assert len(ended) == 5


@asynchronous
async def test_one_group_runs_the_suspects_while_the_others_run_the_rest():
    cluster = Cluster(replicas=3, window=2, batch=4)
    full_windows(cluster, waiting=100)
    cluster.groups[0].lost(cluster.agents[0])
    assert [g.in_flight for g in cluster.groups] == [0, 2, 2]
    # The first group with room gets nothing more until a batch of suspects can run in it.
    cluster.output(2, [0] * 4, replica=1)
    assert cluster.steps(1) == []
    cluster.output(2, [0] * 4, replica=2)
    [(fourth, values)] = cluster.steps(2)
    assert len(values) == 4
    cluster.output(3, [0] * 4, replica=1)
    [(suspects, values)] = cluster.steps(1)
    assert cluster.groups[1].exclusive
    assert [len(call.endings) for call in cluster.groups[1]._steps[suspects].batch.calls] == [1] * 4
    # One batch of them at a time, also where the replica itself is back.
    cluster.join(0)
    assert [len(values) for _, values in cluster.steps(0)] == [4, 4]
    assert [g.exclusive for g in cluster.groups] == [False, True, False]
    cluster.output(fourth, [0] * 4, replica=2)
    assert len(cluster.steps(2)) == 1


@asynchronous
async def test_suspects_and_what_is_more_urgent_take_turns():
    cluster = Cluster(window=2, batch=1)
    suspects = [cluster.submit(i) for i in range(2)]
    urgent = [cluster.submit(i, deadline=time.monotonic() + i) for i in range(10, 16)]
    late = cluster.submit(20)
    cluster.lose()
    order = []
    while steps := cluster.steps():
        order.append([values[0] for _, values in steps])
        for number, values in steps:
            # A group that waits for a suspect's turn gets nothing new.
            cluster.output(number, values)
    assert order == [[0], [10, 11], [1], [12, 13], [14, 15], [20]]
    assert [value(call) for call in (*suspects, *urgent, late)] == [0, 1, 10, 11, 12, 13, 14, 15, 20]


@pytest.mark.parametrize("seed", range(20))
@asynchronous
async def test_poisonous_calls_are_given_up_and_all_others_answered(seed):
    """Replicas that die of them come back now or later; one dies of something else."""
    random = Random(seed)
    cluster = Cluster(replicas=3, window=3, batch=8)
    calls, poison, away, deaths = [], [], [], 0
    for number in range(400):
        deadline = time.monotonic() + random.randrange(60, 600) if random.random() < 0.5 else None
        calls.append(cluster.submit(number, deadline=deadline))
    poison = random.sample(calls[10:], 3)
    of_its_own = random.choice(cluster.groups)
    while not all(call.answer.done() for call in calls):
        assert sum(g.exclusive for g in cluster.groups) <= 1
        assert all(g.in_flight == 1 for g in cluster.groups if g.exclusive)
        if away and (random.random() < 0.2 or len(away) == 3):
            cluster.join(away.pop(random.randrange(len(away))))
        # Nothing waits while there is nothing under way.
        busy = [g for g in cluster.groups if g.in_flight]
        if not busy:
            assert len(away) == 3 or all(call.answer.done() for call in calls)
            continue
        one = random.choice(busy)
        number, step = next(iter(one._steps.items()))
        fatal = any(call in poison for call in step.batch.calls)
        if fatal or (one is of_its_own and one.in_flight == 3):
            of_its_own = None if one is of_its_own else of_its_own
            deaths += 1
            away.append(one.replica)
            one.lost(cluster.agents[one.replica])
        else:
            cluster.output(number, [call.arrays[0][0] for call in step.batch.calls], one.replica)
    for number, call in enumerate(calls):
        if call in poison:
            with pytest.raises(Aborted):
                call.answer.result()
        else:
            assert value(call) == number
    assert deaths <= 3 * 3 + 1


@asynchronous
async def test_second_ending_is_the_calls_own_error():
    cluster = Cluster(window=1)
    poison, good = cluster.submit(1), cluster.submit(2)
    cluster.lose()
    cluster.lose()
    with pytest.raises(Aborted, match=r"2 generations of the group ended while this request ran"):
        poison.answer.result()
    assert cluster.steps() == [(0, [2])]
    cluster.output(0, [2])
    assert value(good) == 2


@asynchronous
async def test_nothing_joins_a_suspect_but_other_replicas_go_on():
    cluster = Cluster(replicas=2, window=3)
    cluster.submit(0)
    cluster.submit(1)
    cluster.steps(1)
    cluster.lose(0)
    assert cluster.steps(0) == [(0, [0])]
    cluster.submit(2)
    cluster.submit(3)
    assert cluster.steps(0) == []
    assert cluster.steps(1) == [(1, [2]), (2, [3])]


@asynchronous
async def test_output_of_another_size_ends_the_connection_and_loses_no_call():
    cluster = Cluster(window=1)
    call = cluster.submit(3)
    cluster.steps()
    with pytest.raises(
        FrameError, match=r"the leader's output doesn't have the exported shapes: a payload of 128 bytes"
    ):
        cluster.output(0, [1] * 30)
    # The FrameError ends the agent's connection; the call is a suspect as any other.
    cluster.lose()
    assert cluster.steps() == [(0, [3])]
    with pytest.raises(FrameError, match=r"the exported shapes"):
        cluster.output(0, [1] * 30)
    cluster.lose()
    with pytest.raises(Aborted, match=r"2 generations"):
        call.answer.result()


@asynchronous
async def test_deaths_under_a_request_that_is_given_up_are_forgiven():
    c = Cluster()
    call = c.submit(1)
    for _ in range(2):
        c.lose()
    with pytest.raises(Aborted):
        call.answer.result()
    assert c.take("forgive") == [(0,), (0,)]


@asynchronous
async def test_a_death_under_several_requests_that_are_given_up_is_forgiven_once():
    c = Cluster(window=2, batch=1)
    for i in range(2):
        c.submit(i)
    # One death under both, then one under each.
    for _ in range(3):
        c.lose()
    assert c.take("forgive") == [(0,)] * 3


@asynchronous
@pytest.mark.parametrize("leaves", ["under way", "waiting", "late"])
async def test_the_death_under_a_lone_suspect_that_nobody_waits_for_any_more_is_forgiven(leaves):
    c = Cluster()
    deadline = time.monotonic() + 0.05 if leaves == "late" else None
    call = c.submit(1, deadline=deadline)
    assert c.steps() == [(0, [1])]
    if leaves == "under way":
        call.answer.cancel()
    c.groups[0].lost(c.agents[0])
    if leaves == "waiting":
        call.answer.cancel()
    while deadline is not None and time.monotonic() < deadline:
        pass
    c.join()
    assert c.steps() == []
    assert call.answer.done()
    assert c.take("forgive") == [(0,)]


def batch_whose_rank_died():
    """A group that has lost its rank under a batch of two calls, and those."""
    c = Cluster(window=1, batch=2)
    c.submit(0)
    calls = [c.submit(i) for i in (1, 2)]
    c.output(0, [0])
    c.groups[0].lost(c.agents[0])
    return c, calls


@asynchronous
async def test_the_death_under_a_batch_is_forgiven_when_nobody_waits_for_any_of_its_calls():
    c, calls = batch_whose_rank_died()
    calls[0].answer.cancel()
    assert c.take("forgive") == []
    calls[1].answer.cancel()
    assert c.take("forgive") == [(0,)]


@asynchronous
async def test_a_death_counts_when_a_call_went_well_after_it_or_several_batches_were_under_it():
    c, calls = batch_whose_rank_died()
    calls[0].answer.cancel()
    c.join()
    # It runs again, and its client leaves meanwhile: what it does is seen all the same.
    [(number, values)] = c.steps()
    assert values == [2]
    calls[1].answer.cancel()
    c.output(number, [2])
    assert c.take("forgive") == []
    c = Cluster(window=2, batch=1)
    calls = [c.submit(i) for i in (1, 2)]
    c.groups[0].lost(c.agents[0])
    for call in calls:
        call.answer.cancel()
    assert c.take("forgive") == []
