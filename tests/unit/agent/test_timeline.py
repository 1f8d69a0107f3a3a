"""What an agent records of its steps, and that whoever asks disturbs none."""

import threading

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.agent.timeline import Timeline
from shardserve.wire.messages import Generation, group

from .scripted import output, send_step
from .test_agent import X, registered

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_the_last_steps_are_kept():
    timeline = Timeline(3)
    for step in range(5):
        timeline.record((Generation(7, 1 + step // 4), step, step + 0.1, step + 0.2, step + 0.3, step + 0.4))
    times = timeline.times()
    assert (times.names.incarnations, times.names.counters, times.names.steps) == ([7] * 3, [1, 1, 2], [2, 3, 4])
    assert (times.received, times.ready) == ([2.1, 3.1, 4.1], [2.2, 3.2, 4.2])
    assert (times.started, times.finished) == ([2.3, 3.3, 4.3], [2.4, 3.4, 4.4])


def test_one_thread_records_while_another_reads():
    timeline, stop = Timeline(500), threading.Event()

    def record():
        step = 0
        while not stop.is_set():
            timeline.record((Generation(1, 1), step, 0.0, 0.0, 0.0, 0.0))
            step += 1

    thread = threading.Thread(target=record)
    thread.start()
    for _ in range(200):
        steps = timeline.times().names.steps
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
    stop.set()
    thread.join()


@asynchronous
async def test_a_rank_tells_its_steps_when_it_is_asked(tmp_path, ports):
    async with registered(tmp_path, ports, 1, 2) as (worker, agents):
        generation = await worker.form(agents)
        for step in range(3):
            send_step(agents, generation, step, X, 1)
        for _ in range(3):
            await agents[1].next(group.Output)
        found = []
        for number, agent in enumerate(agents):
            agent.send(group.AskTimes(7 + number))
            clock = await agent.next(group.Clock)
            answer = await agent.next(group.Times)
            assert clock.request == answer.request == 7 + number
            times = answer.times
            assert (times.names.counters, times.names.steps) == ([1] * 3, [0, 1, 2])
            for row in zip(times.received, times.ready, times.started, times.finished, [clock.now] * 3, strict=True):
                assert row[0] <= row[2] <= row[3] <= row[4]
                assert row[1] <= row[2]
            found.append(times)
        first, second = found
        assert first.ready == first.received
        # One clock on one host: the second stage has its input when the first one has finished.
        for finished, ready, started in zip(first.finished, second.ready, second.started, strict=True):
            assert finished <= ready <= started


@asynchronous
async def test_a_rank_that_waits_in_a_step_answers_all_the_same(tmp_path, ports):
    async with registered(tmp_path, ports, 2, 1) as (worker, agents):
        generation = await worker.form(agents)
        # Only rank 0 has the step: it waits for rank 1 in a collective.
        send_step(agents[:1], generation, 0, X)
        agents[0].send(group.AskTimes(1))
        assert (await agents[0].next(group.Clock)).now > 0
        assert (await agents[0].next(group.Times)).times.names.steps == []
        send_step(agents[1:], generation, 0, X)
        await agents[0].next(group.Output)
        assert np.array_equal(output(agents[0], X.shape), 2 * X)
