"""Python stages in real processes, under a pool whose model is scripted."""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import time
import weakref

import numpy as np
import psutil
import pytest
import uvloop

from shardserve.errors import (
    MAX_TEXT,
    Aborted,
    DeadlineExceeded,
    InvalidInput,
    MessageTooLarge,
    Overloaded,
    StageError,
    Unavailable,
)
from shardserve.servable import load_servable
from shardserve.wire.messages import stages
from shardserve.worker.stages.pool import StagePool

from ..harness import asynchronous, quick

pytestmark = pytest.mark.usefixtures("nothing_left")

SERVABLE = """
import os
import signal
import time

import numpy as np

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1)


def one(x):
    if isinstance(x, str):
        return {"pid": os.getpid(), "upper": x.upper(), "float": 0.5, "bytes": b"ab", "none": None}[x]
    return x + 1


def two(x):
    return (x, x * 2) if x[0] != 9 else x


def batched(instances):
    if any(x[0] == 13 for (x,) in instances):
        raise ValueError("thirteen")
    return [np.array([len(instances), x[0]]) for (x,) in instances]


def yielding(instances):
    for (x,) in instances:
        for _ in range({5: 0, 6: 2}.get(int(x[0]), 1)):
            yield x * 10


def endless(instances):
    while True:
        yield 1


def number(instances):
    return 7


def dies(x):
    if x[0] == 3:
        os._exit(7)
    if x[0] == 4:
        os.kill(os.getpid(), signal.SIGSEGV)
    return x


def batch_dies(instances):
    return [dies(x) for (x,) in instances]


def sleeps(x):
    time.sleep(x[0])
    return x


def batch_sleeps(instances):
    for (x,) in instances:
        time.sleep(x[0])
    return [x for (x,) in instances]


def leaves(x):
    raise KeyboardInterrupt if x[0] == 2 else SystemExit("bye")


def calls(x):
    return model.call(x, subgraph=int(x[0]))


def calls_batch(instances):
    return [outputs[0] for outputs in model.call(instances)]


def catches(x):
    try:
        return model.call(x)
    except Exception as error:
        return type(error).__name__


def wrong_call(x):
    return model.call()


class NoText(Exception):
    def __str__(self):
        raise ValueError("no text")


def raises(x):
    raise {"surrogate": OSError("no such file: caf\\udce9"), "no text": NoText(), "long": OSError("x" * 1_000_000)}[x]


def method(f, count, batch_size):
    def run(x):
        return register.add_stage(f, x, outputs_count=count, batch_size=batch_size, tag="the tag")

    run.__name__ = f.__name__
    register.register_method([f"y{i}" for i in range(count)])(run)


for f, count, batch_size in (
    (one, 1, None), (two, 2, None), (batched, 1, 2), (yielding, 1, 0), (endless, 1, 0), (number, 1, 0),
    (dies, 1, None), (batch_dies, 1, 0), (sleeps, 1, None), (batch_sleeps, 1, 0), (leaves, 1, None), (calls, 1, None),
    (calls_batch, 1, 0), (catches, 1, None), (wrong_call, 1, None),
    (raises, 1, None),
):
    method(f, count, batch_size)
"""


class Models:
    """What `Model.call` meets: gives x + 100 * subgraph; values from 50 on are answered by the errors in `errors`."""

    def __init__(self):
        self.calls = []
        self.errors = {50: InvalidInput("not that"), 51: Aborted("state lost")}
        self.called = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def run(self, model, subgraph, values, deadline, session):
        self.calls.append((subgraph, values[0].tolist(), deadline))
        self.called.set()
        await self.hold.wait()
        if int(values[0][0]) in self.errors:
            raise self.errors[int(values[0][0])]
        return (values[0] + 100 * subgraph,)


@contextlib.contextmanager
def no_descriptors():
    """None can be had beside those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Setting:
    def __init__(self, directory, size=1, source=SERVABLE, **settings):
        (directory / "net").mkdir()
        (directory / "net" / "servable_config.py").write_text(source)
        self.servable = load_servable(str(directory), "net")
        self.models = Models()
        self.said = asyncio.Queue()
        settings = quick(**settings)
        self.pool = StagePool(
            self.servable,
            stages.Load(str(directory), "net", 1),
            size,
            self.models,
            settings,
            lambda: self.said.put_nowait("ready"),
            lambda reason: self.said.put_nowait(reason),
        )

    async def __aenter__(self):
        self.pool.start()
        return self

    async def __aexit__(self, *error):
        self.pool.close("the test is over")

    def begin(self, method, value, deadline=None):
        value = value if isinstance(value, str) else np.array([value])
        stage = self.servable.methods[method].stages[0]
        return asyncio.ensure_future(self.pool.run(method, 1, stage, (value,), deadline, None))

    async def results(self, method, *values):
        return await asyncio.gather(*(self.begin(method, value) for value in values), return_exceptions=True)

    async def run(self, method, value, **options):
        return await self.begin(method, value, **options)


@asynchronous
async def test_values_go_there_and_back(tmp_path):
    async with Setting(tmp_path) as s:
        assert not s.pool.ready
        assert (await s.run("one", 4))[0].tolist() == [5]
        assert await s.said.get() == "ready"
        assert s.pool.ready
        assert await s.run("one", "upper") == ("UPPER",)
        assert await s.run("one", "bytes") == (b"ab",)
        assert (await s.run("one", "float"))[0].tolist() == [0.5]
        assert [array.tolist() for array in await s.run("two", 4)] == [[4], [8]]
        [pid] = await s.run("one", "pid")
        assert [int(pid[0])] == s.pool.pids != [os.getpid()]


@asynchronous
async def test_what_a_function_does_wrong_fails_its_instance_alone(tmp_path):
    async with Setting(tmp_path) as s:
        where = "method 'one', stage 'the tag': "
        good, key, none = await s.results("one", 1, "nothing", "none")
        assert good[0].tolist() == [2]
        assert (type(key), str(key)) == (StageError, f"{where}KeyError: 'nothing'")
        assert str(none) == f"{where}output 0: NoneType is neither a numpy array nor a number, str or bytes"
        wrong, good = await s.results("two", 9, 1)
        assert str(wrong) == "method 'two', stage 'the tag': gave 1 outputs for an instance; outputs_count=2"
        assert good[1].tolist() == [2]
        left, interrupted = await s.results("leaves", 1, 2)
        assert str(left) == "method 'leaves', stage 'the tag': SystemExit: bye"
        assert str(interrupted) == "method 'leaves', stage 'the tag': KeyboardInterrupt"
        [pid] = await s.run("one", "pid")
        assert s.pool.pids == [int(pid[0])]


@asynchronous
async def test_an_errors_text_has_an_end(tmp_path):
    async with Setting(tmp_path) as s:
        [long] = await s.results("one", "x" * 1_000_000)
        begin = "method 'one', stage 'the tag': KeyError: 'xxx"
        assert str(long).startswith(begin)
        left_out = len(begin) - 3 + 1_000_000 + 1 - MAX_TEXT
        assert str(long)[MAX_TEXT - 3 :] == f"xxx… ({left_out} more characters left out)"


@asynchronous
async def test_an_error_whose_text_can_not_be_sent_or_made_is_no_death(tmp_path):
    async with Setting(tmp_path) as s:
        surrogate, textless = await s.results("raises", "surrogate", "no text")
        where = "method 'raises', stage 'the tag': "
        assert (type(surrogate), str(surrogate)) == (StageError, f"{where}OSError: no such file: caf\\udce9")
        assert (type(textless), str(textless)) == (StageError, f"{where}NoText: (its text can't be made: ValueError)")
        [pid] = await s.run("one", "pid")
        assert s.pool.pids == [int(pid[0])]


@asynchronous
async def test_an_errors_text_has_an_end_in_the_log_too(tmp_path, capfd):
    async with Setting(tmp_path) as s:
        await s.results("raises", "long")
    logged = capfd.readouterr().err
    assert "method 'raises', stage 'the tag' raised\nTraceback" in logged
    assert "more characters left out" in logged
    assert len(logged) < 50_000


@asynchronous
async def test_batches_are_at_most_of_the_batch_size(tmp_path):
    async with Setting(tmp_path) as s:
        first, *rest = await s.results("batched", 1, 2, 3, 4, 5)
        assert [first[0].tolist(), *(result[0].tolist() for result in rest)] == [[2, 1], [2, 2], [2, 3], [2, 4], [1, 5]]


@asynchronous
async def test_of_a_batch_that_raises_only_the_instance_at_fault_fails(tmp_path):
    async with Setting(tmp_path) as s:
        bad, good = await s.results("batched", 13, 2)
        assert str(bad) == "method 'batched', stage 'the tag': ValueError: thirteen"
        assert good[0].tolist() == [1, 2]


@asynchronous
async def test_a_run_that_no_frame_can_carry_is_cut_into_smaller_ones(tmp_path, monkeypatch):
    async with Setting(tmp_path) as s:
        await s.run("yielding", 1)
        monkeypatch.setattr("shardserve.wire.frames.MAX_HEADER", 100)
        long = np.array(["x"] * 100)
        stage = s.servable.methods["yielding"].stages[0]
        calls = [s.begin("yielding", value) for value in range(2, 5)]
        calls.append(asyncio.ensure_future(s.pool.run("yielding", 1, stage, (long,), None, None)))
        *good, bad = await asyncio.gather(*calls, return_exceptions=True)
        assert [result[0].tolist() for result in good] == [[20], [30], [40]]
        assert isinstance(bad, MessageTooLarge)


@asynchronous
async def test_too_few_and_too_many_results_are_nobody_elses(tmp_path):
    async with Setting(tmp_path) as s:
        one, few, two = await s.results("yielding", 1, 5, 2)
        assert (one[0].tolist(), two[0].tolist()) == ([10], [20])
        assert "stage 'the tag': gave 0 results for 1 instances" in str(few)
        one, many, two = await s.results("yielding", 1, 6, 2)
        assert (one[0].tolist(), two[0].tolist()) == ([10], [20])
        assert "gave more than 1 results for 1 instances" in str(many)
        [endless] = await s.results("endless", 1)
        assert "gave more than 1 results" in str(endless)
        [number] = await s.results("number", 1)
        assert "returned a value of type int for 1 instances; a list, tuple or generator" in str(number)


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


@asynchronous
async def test_a_function_that_hangs_past_its_deadline_is_ended_and_others_are_not_delayed(tmp_path):
    async with Setting(tmp_path, size=2, stage_grace=0.05) as s:
        await s.said.get()
        before = set(s.pool.pids)
        hanging = s.begin("sleeps", 1000, deadline=time.monotonic() + 0.1)
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
                with pytest.raises(DeadlineExceeded, match="the deadline passed while it ran"):
                    await s.run("sleeps", 0.1, deadline=deadline)
                await s.run("one", 1)

    uvloop.run(asyncio.wait_for(test(), 60))


@asynchronous
async def test_a_function_that_takes_longer_than_stage_timeout(tmp_path):
    async with Setting(tmp_path, stage_timeout=0.2) as s:
        [late] = await s.results("sleeps", 1000)
        assert str(late) == "method 'sleeps', stage 'the tag': gave no result within stage_timeout (0.2 s)"
        assert (await s.run("one", 1))[0].tolist() == [2]


@asynchronous
async def test_of_a_batch_that_hangs_only_the_instance_at_fault_fails(tmp_path):
    async with Setting(tmp_path, stage_timeout=0.3) as s:
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
        hasty = begin("hasty", 1000, time.monotonic() + 0.2)
        assert (await first)[0].tolist() == [0]
        one, culprit, two, late = await asyncio.gather(*tasks, hasty, return_exceptions=True)
        assert (one[0].tolist(), two[0].tolist()) == ([0], [0])
        where = "method 'batch_sleeps', stage 'the tag'"
        assert (type(culprit), str(culprit)) == (StageError, f"{where}: gave no result within stage_timeout (0.3 s)")
        assert type(late) is DeadlineExceeded
        assert str(late).startswith(f"{where}: the deadline passed while ")
        # Who can't be served any more is told so at once, not after the culprit has run again.
        assert order == ["first", "hasty", "one", "culprit", "two"]
        assert before not in s.pool.pids


@asynchronous
async def test_model_calls(tmp_path):
    async with Setting(tmp_path) as s:
        deadline = time.monotonic() + 60
        assert (await s.run("calls", 2, deadline=deadline))[0].tolist() == [202]
        assert s.models.calls == [(2, [2], deadline)]
        results = await s.results("calls_batch", 1, 50, 2)
        assert results[0][0].tolist() == [1]
        assert str(results[1]) == "method 'calls_batch', stage 'the tag': InvalidInput: not that"
        assert results[2][0].tolist() == [2]
        # What is of the server isn't the instance's fault: it fails the request, as anywhere.
        [aborted] = await s.results("calls", 51)
        assert (type(aborted), str(aborted)) == (Aborted, "state lost")
        assert await s.run("catches", 51) == ("Aborted",)
        [wrong] = await s.results("wrong_call", 1)
        assert "Model.call: is given no inputs" in str(wrong)


@asynchronous
async def test_a_model_call_that_nobody_waits_for_ends(tmp_path):
    async with Setting(tmp_path) as s:
        s.models.hold.clear()
        waiting = s.begin("calls", 1)
        await s.models.called.wait()
        waiting.cancel()
        [pid] = await s.run("one", "pid")
        assert s.pool.pids == [int(pid[0])]


@asynchronous
async def test_calls_whose_deadline_passed_in_the_queue_do_not_run(tmp_path):
    async with Setting(tmp_path) as s:
        with pytest.raises(DeadlineExceeded, match="while the request waited for a process"):
            await s.run("one", 1, deadline=time.monotonic() - 1)


@asynchronous
async def test_bounds(tmp_path):
    async with Setting(tmp_path, queue_limit=2) as s:
        results = await s.results("one", 1, 2, 3)
        assert isinstance(results[2], Overloaded)
        assert results[0][0].tolist() == [2]
        slow = s.begin("sleeps", 1000)
        await asyncio.sleep(0)
        s.pool.close("stopped")
        with pytest.raises(Unavailable, match="stopped"):
            await slow
        with pytest.raises(Unavailable, match="stopped"):
            await s.run("one", 1)


@asynchronous
async def test_a_call_whose_client_left_holds_no_place_and_no_memory(tmp_path):
    async with Setting(tmp_path, queue_limit=2) as s:
        await s.said.get()
        running = s.begin("sleeps", 1000)
        await asyncio.sleep(0)
        stage = s.servable.methods["one"].stages[0]
        for _ in range(3):
            value = np.ones(1)
            seen = weakref.ref(value)
            left = [asyncio.ensure_future(s.pool.run("one", 1, stage, (value,), None, None)) for _ in range(2)]
            del value
            await asyncio.sleep(0)
            for call in left:
                call.cancel()
            await asyncio.wait(left)
            assert all(call.cancelled() for call in left)
            del left, call
            gc.collect()
            assert seen() is None
        running.cancel()
        assert (await s.run("one", 1))[0].tolist() == [2]


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
