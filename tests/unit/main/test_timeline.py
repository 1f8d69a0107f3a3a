"""`Admin.Timeline`, as clients see it, over scripted Workers."""

import asyncio
import time

import pytest
from main_harness import Launcher, Worker, announce, attached

from shardserve.client import timeline
from shardserve.errors import ConfigError, DeadlineExceeded, NotFound, ShardserveError, Unavailable
from shardserve.wire.messages import front
from shardserve.wire.messages.times import RankTimes, ReplicaTimes, StepNames

NAMES = StepNames([1, 1], [2, 2], [7, 8])
REPLICA = ReplicaTimes(
    NAMES,
    subgraphs=[0, 1],
    instances=[4, 1],
    forms=[0, 1],
    dims=[{"batch": 4}, {"batch": 1, "length": 9}],
    queued=[10.0, 11.0],
    sent=[10.5, 11.5],
    answered=[12.0, 13.0],
    failed=[False, True],
    ended=[False, False],
)
RANK = RankTimes(NAMES, [110.6, 111.6], [110.7, 111.7], [110.8, 111.8], [111.0, 112.0])


def tells(worker, message, payload):
    """Ranks in any order; an answer to a request that was never made, in between."""
    assert isinstance(message, front.AskTimeline)
    worker.send(front.ReplicaTimeline(message.request, 0, REPLICA))
    worker.send(front.ReplicaTimeline(message.request + 99, 0, REPLICA))
    worker.send(front.RankTimeline(message.request, 0, 1, 1, "10.0.0.2", "cpu", 43, 100.0, 0.01, RANK))
    worker.send(front.RankTimeline(message.request, 0, 0, 0, "10.0.0.1", "cpu", 42, 0.0, 0.0, RANK))
    worker.send(front.TimelineEnd(message.request, 4096, 20.0, (2, 3)))


def keeps_silent(worker, message, payload):
    pass


def ask(*workers, calls):
    """What each of these calls gives, or raises, one after the other; gives them the server's address."""

    async def run():
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, *workers):
                return await asyncio.to_thread(lambda: [attempt(call, address) for call in calls])

    def attempt(call, address):
        try:
            return call(address)
        except ShardserveError as error:
            return error

    return asyncio.run(run())


def by_name(name, version=0):
    return lambda address: timeline(address, name, version, timeout=10)


def test_steps_are_rows_on_the_workers_clock():
    one, all_of_them = ask(Worker(tells), calls=[by_name("echo"), by_name("")])
    assert all_of_them == one
    [servable] = one["servables"]
    [replica] = servable.pop("replicas")
    assert servable == {
        "name": "echo",
        "version": 1,
        "reason": "",
        "capacity": 4096,
        "now": 20.0,
        "missing_ranks": [2, 3],
    }
    assert replica["steps"][1] == {
        "generation": [1, 2],
        "step": 8,
        "subgraph": 1,
        "instances": 1,
        "dims": {"batch": 1, "length": 9},
        "queued": 11.0,
        "sent": 11.5,
        "answered": 13.0,
        "failed": True,
        "ended": False,
    }
    near, far = replica["ranks"]
    assert (near["rank"], far["rank"], far["stage"], far["host"], far["pid"]) == (0, 1, 1, "10.0.0.2", 43)
    assert (far["clock_offset"], far["clock_error"]) == (100.0, 0.01)
    assert near["steps"][0]["received"] == 110.6
    step = far["steps"][0]
    assert (step["generation"], step["step"]) == ([1, 2], 7)
    times = [step[key] for key in ("received", "ready", "started", "finished")]
    assert times == pytest.approx([10.6, 10.7, 10.8, 11.0])


def test_a_name_that_there_is_not():
    calls = by_name("nobody"), by_name("echo", 9), by_name("", 3), by_name("echo", -1)
    nobody, version, unnamed, negative = ask(Worker(tells), calls=calls)
    assert isinstance(nobody, NotFound)
    assert "there are: 'echo' version 1" in str(nobody)
    assert isinstance(version, NotFound)
    assert isinstance(unnamed, ConfigError)
    assert isinstance(negative, ConfigError)


def test_no_servable_so_far():
    one, all_of_them = ask(calls=[by_name("echo"), by_name("")])
    assert isinstance(one, Unavailable)
    assert all_of_them == {"servables": []}


def test_a_worker_that_says_nothing(monkeypatch):
    monkeypatch.setenv("SHARDSERVE_TIMELINE_TIMEOUT", "0.1")
    workers = Worker(keeps_silent), Worker(tells, announce("other"))
    one, all_of_them = ask(*workers, calls=[by_name("echo"), by_name("")])
    assert isinstance(one, DeadlineExceeded)
    assert "waited 0.1 s for the Worker of servable 'echo' version 1 to tell what it recorded" in str(one)
    reasons = [servable["reason"] for servable in all_of_them["servables"]]
    assert "waited 0.1 s for the Worker" in reasons[0]
    assert reasons[1] == ""


@pytest.mark.parametrize(("timeout", "given"), [(4.0, 4.0), (100.0, 10.0), (None, 10.0)])
def test_a_worker_has_until_shortly_before_the_clients_deadline(timeout, given):
    """And timeline_timeout (10 s) at most."""
    asked = []

    def notes(worker, message, payload):
        asked.append(message.deadline - time.monotonic())
        tells(worker, message, payload)

    ask(Worker(notes), calls=[lambda address: timeline(address, timeout=timeout)])
    [left] = asked
    assert given - 1 < left <= given


def test_others_are_told_of_when_a_worker_says_nothing_until_the_clients_deadline():
    workers = Worker(keeps_silent), Worker(tells, announce("other"))
    [found] = ask(*workers, calls=[lambda address: timeline(address, timeout=1)])
    silent, other = found["servables"]
    assert "for the Worker of servable 'echo' version 1 to tell what it recorded" in silent["reason"]
    assert len(other["replicas"]) == 1


def test_a_worker_that_dies_meanwhile():
    async def run():
        async with Launcher() as launcher:
            address = await launcher.grpc()
            worker = Worker(keeps_silent)
            async with attached(launcher, worker):
                asked = asyncio.create_task(asyncio.to_thread(timeline, address, "echo", 0, 10))
                await worker.next(front.AskTimeline)
                await worker.die()
                with pytest.raises(Unavailable, match="its Worker ended while it told what it recorded"):
                    await asked
                with pytest.raises(Unavailable, match="has no Worker now: waiting for its Worker to start"):
                    await asyncio.to_thread(timeline, address, "echo", 0, 10)

    asyncio.run(run())


def test_a_worker_is_asked_one_at_a_time():
    async def run():
        async with Launcher() as launcher:
            address = await launcher.grpc()
            worker = Worker(keeps_silent)
            async with attached(launcher, worker):
                one = asyncio.create_task(asyncio.to_thread(timeline, address, "echo", 0, 20))
                first = await worker.next(front.AskTimeline)
                others = [asyncio.create_task(asyncio.to_thread(timeline, address, "echo", 0, 20)) for _ in range(3)]
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(worker.frames.get(), 0.5)
                tells(worker, first, None)
                assert len((await one)["servables"]) == 1
                await worker.next(front.AskTimeline)
                assert worker.frames.empty()
                await worker.die()  # Those that wait for their turn hear of it, too.
                for other in others:
                    with pytest.raises(Unavailable, match="its Worker ended while it told what it recorded"):
                        await other

    asyncio.run(run())
