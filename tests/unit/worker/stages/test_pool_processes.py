"""Processes of Python stages that die, hang, or can't be started or loaded."""

import asyncio
import errno
import os
import signal
import time

import psutil
import pytest
import uvloop
from asynchronous import asynchronous
from limits import memory_left

from shardserve.errors import DeadlineExceeded, StageError, Unavailable

from .harness import SERVABLE, Setting, no_descriptors

pytestmark = pytest.mark.usefixtures("nothing_left")


@asynchronous
async def test_a_process_that_dies_fails_its_instance_and_is_replaced(tmp_path):
    async with Setting(tmp_path) as s:
        await s.run("one", 1)
        [before] = s.pool.pids
        exited, good, crashed = await s.results("dies", 3, 1, 4)
        assert str(exited) == f"method 'dies', stage 'the tag': its process (pid {before}) ended with code 7"
        assert good[0].tolist() == [1]
        assert "ended with code -11" in str(crashed)
        one, bad, two = await s.results("batch_dies", 1, 3, 2)
        assert (one[0].tolist(), two[0].tolist()) == ([1], [2])
        assert "ended with code 7" in str(bad)


GIVES = """
import numpy as np
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1)

def zeros(n):
    return np.zeros(int(n[0]), np.uint8)

@register.register_method(output_names=["y"])
def gives(n):
    return register.add_stage(zeros, n, outputs_count=1)
"""


@asynchronous
async def test_outputs_that_the_worker_has_no_memory_for_fail_their_instance(tmp_path):
    # More than is left together with a heap of glibc's for threads, 64 MB, which may go meanwhile.
    size = 128 << 20
    async with Setting(tmp_path, source=GIVES) as s:
        assert await s.said.get() == "ready"
        [before] = s.pool.pids
        with memory_left(size // 4):
            [failed] = await s.results("gives", size)
        why = f"its process (pid {before}) gave more than the Worker can take: no memory for {size} bytes"
        assert str(failed) == f"method 'gives', stage 'zeros': {why}"
        assert len((await s.run("gives", 3))[0]) == 3


@asynchronous
async def test_a_function_that_hangs_past_its_deadline_is_ended_and_others_are_not_delayed(tmp_path):
    async with Setting(tmp_path, size=2, stage_grace=0.05) as s:
        await s.said.get()
        before = set(s.pool.pids)
        hanging = s.begin("sleeps", 1000, deadline=time.monotonic() + 0.5)
        assert (await s.run("one", 1))[0].tolist() == [2]
        with pytest.raises(
            DeadlineExceeded, match=r"method 'sleeps', stage 'the tag': the deadline passed while it ran"
        ):
            await hanging
        given_up = s.begin("sleeps", 1000)
        await asyncio.sleep(0)
        given_up.cancel()
        results = await s.results("one", 1, 2, 3)
        assert [result[0].tolist() for result in results] == [[2], [3], [4]]
        while before & set(s.pool.pids):
            await s.run("one", 1)


@pytest.fixture(scope="module")
def uvloops_pipe():
    """libuv has a pipe for signals, from a process's first loop to the process's end."""
    uvloop.run(asyncio.sleep(0))


def test_a_deadline_counts_though_its_timer_is_early(uvloops_pipe, tmp_path):
    """uvloop's are, by up to a millisecond, in a third of all cases."""

    async def test():
        async with Setting(tmp_path) as s:
            await s.said.get()
            for i in range(15):
                deadline = time.monotonic() + 0.01 + i * 0.00023
                # On a busy machine it may have passed before it could run.
                with pytest.raises(DeadlineExceeded, match="the deadline passed while"):
                    await s.run("sleeps", 0.1, deadline=deadline)
                await s.run("one", 1)

    uvloop.run(asyncio.wait_for(test(), 60))


@asynchronous
async def test_a_function_that_takes_longer_than_stage_timeout(tmp_path):
    async with Setting(tmp_path, stage_timeout=0.5) as s:
        [late] = await s.results("sleeps", 1000)
        assert str(late) == "method 'sleeps', stage 'the tag': gave no result within stage_timeout (0.5 s)"
        assert (await s.run("one", 1))[0].tolist() == [2]


@asynchronous
async def test_of_a_batch_that_hangs_only_the_instance_at_fault_fails(tmp_path):
    async with Setting(tmp_path, stage_timeout=0.7) as s:
        await s.said.get()
        [before] = s.pool.pids
        order = []

        def begin(name, value, deadline=None):
            task = s.begin("batch_sleeps", value, deadline)
            task.add_done_callback(lambda _: order.append(name))
            return task

        # All but the first, with which the process is busy, share a run.
        first = begin("first", 0)
        tasks = [begin("one", 0), begin("culprit", 1000), begin("two", 0, time.monotonic() + 60)]
        hasty = begin("hasty", 1000, time.monotonic() + 0.5)
        assert (await first)[0].tolist() == [0]
        one, culprit, two, late = await asyncio.gather(*tasks, hasty, return_exceptions=True)
        assert (one[0].tolist(), two[0].tolist()) == ([0], [0])
        where = "method 'batch_sleeps', stage 'the tag'"
        assert (type(culprit), str(culprit)) == (StageError, f"{where}: gave no result within stage_timeout (0.7 s)")
        assert type(late) is DeadlineExceeded
        assert str(late).startswith(f"{where}: the deadline passed while ")
        # Who can't be served any more is told so at once, not after the culprit has run again.
        assert order == ["first", "hasty", "one", "culprit", "two"]
        assert before not in s.pool.pids


async def kill(s):
    """Returns when the pool has seen it, and has tried to start another."""
    running = s.begin("sleeps", 1000)
    os.kill(s.pool.pids[0], signal.SIGKILL)
    with pytest.raises(StageError, match="ended with code -9"):
        await running


@asynchronous
async def test_a_process_that_could_not_be_started_is_tried_again(tmp_path):
    async with Setting(tmp_path) as s:
        await s.said.get()
        with no_descriptors():
            await kill(s)
            assert s.pool.pids == []
        assert (await s.run("one", 1))[0].tolist() == [2]


@asynchronous
async def test_a_process_that_can_not_be_started_any_more(tmp_path):
    async with Setting(tmp_path, max_restarts=2) as s:
        await s.said.get()
        with no_descriptors():
            await kill(s)
            waiting = s.begin("one", 1)
            reason = await s.said.get()
            assert reason.startswith("Python stages can't run: a process can't be started: [Errno 24] Too many open f")
            with pytest.raises(Unavailable, match="Too many open files"):
                await waiting


@pytest.mark.parametrize("again", [True, False])
@asynchronous
async def test_a_process_that_dies_while_it_loads_is_tried_again_where_others_have_loaded_before(tmp_path, again):
    async with Setting(tmp_path, first_start=not again) as s:
        [pid] = s.pool.pids
        os.kill(pid, signal.SIGKILL)
        if again:
            assert await s.said.get() == "ready"
            assert (await s.run("one", 1))[0].tolist() == [2]
        else:
            dead = f"Python stages can't run: the process of Python stages (pid {pid}) ended with code -9"
            assert await s.said.get() == dead


@asynchronous
async def test_a_process_that_dies_again_and_again_without_a_call_is_given_up(tmp_path):
    async with Setting(tmp_path, max_restarts=2) as s:
        assert await s.said.get() == "ready"
        for _ in range(3):
            assert (await s.run("one", 1))[0].tolist() == [2]
            [pid] = s.pool.pids
            os.kill(pid, signal.SIGKILL)
            while pid in s.pool.pids:
                await asyncio.sleep(0.01)
        dead = f"Python stages can't run: the process (pid {pid}) that ran nothing ended with code -9"
        assert await s.said.get() == dead


@asynchronous
async def test_while_a_process_lives_those_that_can_not_be_started_are_tried_again(tmp_path):
    async with Setting(tmp_path, size=2, max_restarts=1) as s:
        assert await s.said.get() == "ready"
        await s.results("one", 1, 2)
        with no_descriptors():
            await kill(s)
            [left] = s.pool.pids
            while not s.pool._restarts.spent:
                assert (await s.run("one", 1))[0].tolist() == [2]
        while len(s.pool.pids) < 2:
            assert (await s.run("one", 1))[0].tolist() == [2]
        assert left in s.pool.pids
        assert s.said.empty()


@asynchronous
async def test_a_start_that_fails_leaves_no_process(tmp_path, monkeypatch):
    started = []

    def refuse(pid):
        started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    s = Setting(tmp_path)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    s.pool.start()
    assert await s.said.get() == "Python stages can't run: a process can't be started: [Errno 24] Too many open files"
    assert not psutil.pid_exists(started[0])


@asynchronous
async def test_a_function_imports_what_is_beside_the_config_when_it_runs(tmp_path):
    source = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1)


def late(x):
    from beside_the_config import SEVEN

    return x * SEVEN


@register.register_method(["y"])
def run(x):
    return register.add_stage(late, x, outputs_count=1)
"""
    async with Setting(tmp_path, source=source) as s:
        [config] = tmp_path.rglob("servable_config.py")
        config.with_name("beside_the_config.py").write_text("SEVEN = 7\n")
        assert (await s.run("run", 6))[0].tolist() == [42]


@asynchronous
async def test_a_servable_that_can_not_be_loaded_there(tmp_path):
    guard = """
import os

mark = __file__ + ".loaded"
if os.path.exists(mark):
    raise OSError("no camera")
open(mark, "w").close()
"""
    async with Setting(tmp_path, source=guard + SERVABLE) as s:
        reason = await s.said.get()
        assert reason.startswith("Python stages can't run: ")
        assert reason.endswith("servable_config.py, line 6: OSError: no camera")
        with pytest.raises(Unavailable, match="no camera"):
            await s.run("one", 1)
