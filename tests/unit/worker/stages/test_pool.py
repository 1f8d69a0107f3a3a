"""What functions give, raise and call, in real processes under a pool whose model is scripted."""

import asyncio
import gc
import os
import time
import weakref

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.errors import MAX_TEXT, Aborted, DeadlineExceeded, MessageTooLarge, Overloaded, StageError, Unavailable

from .harness import Setting

pytestmark = pytest.mark.usefixtures("nothing_left")


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
