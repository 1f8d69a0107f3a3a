"""What `Model.call` promises inside a real process: whose run a call belongs to, and what ends it."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import stages
from shardserve.worker.stages.values import encode_values

from .harness import Setting

pytestmark = pytest.mark.usefixtures("nothing_left")

SERVABLE = """
import asyncio
import contextvars
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1{options})
kept = ThreadPoolExecutor(1)
later = threading.Event()
late = []


def attempt(x):
    try:
        return str(model.call(x))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def of_threads(x):
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda i: model.call(x + i), range(8)))


def of_tasks(x):
    async def together():
        return sum(await asyncio.gather(*(asyncio.to_thread(model.call, x + i) for i in range(8))))

    return asyncio.run(together())


def in_kept(x):
    return kept.submit(attempt, x).result()


def in_kept_with_context(x):
    return kept.submit(contextvars.copy_context().run, model.call, x).result()


def leaves_a_thread(x):
    def wait():
        later.wait()
        late.append(attempt(x))

    thread = threading.Thread(target=wait)
    thread.start()
    late.append(thread)
    return x


def leaves_a_thread_that_tells(path):
    def tell():
        open(path).close()
        told = attempt(model_input)
        with open(path, "w") as fifo:
            fifo.write(told)

    threading.Thread(target=tell).start()
    return path


def leaves_a_call(path):
    thread = threading.Thread(target=lambda: late.append(attempt(model_input)))
    thread.start()
    late.append(thread)
    open(path).close()
    return path


def joins(x):
    later.set()
    late[0].join()
    mine = model.call(x)
    return f"{late[1]}; {mine}"


def remembers(x):
    global model_input
    model_input = x
    return x


def forks(x):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, attempt(x + 1000).encode())
        os._exit(0)
    y = model.call(x)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading) as told:
        return f"{told.read()}; {y}"


def comes_back(x):
    pid = os.fork()
    if pid:
        return x + os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if x[0] == 100:
        raise ValueError("in the child")
    return x - 1


def stays(writing):
    os.write(writing, b"x")
    threading.Event().wait()


def ends_its_own(x):
    started = subprocess.Popen(["sleep", "1000"])
    reading, writing = os.pipe()
    forked = multiprocessing.get_context("fork").Process(target=stays, args=(writing,))
    forked.start()
    try:
        os.read(reading, 1)
        started.terminate()
        forked.terminate()
        forked.join(30)
        return f"{started.wait(30)} {forked.exitcode}"
    finally:
        started.kill()
        forked.kill()


def tells(x):
    print("saw", attempt(x), file=sys.stderr, flush=True)
    return model.call(x)


def method(f):
    register.register_method(["y"])(named(f.__name__, lambda x: register.add_stage(f, x, outputs_count=1)))


def named(name, f):
    f.__name__ = name
    return f


for f in (
    of_threads, of_tasks, in_kept, in_kept_with_context, leaves_a_thread, leaves_a_thread_that_tells, leaves_a_call,
    joins, remembers, forks, comes_back, ends_its_own, tells,
):
    method(f)
"""

STATEFUL = ", stateful=True"
NOT_ITS_OWN = "ConfigError: Model.call: this thread is of another run of the Python stage, or of none, and the state"


def setting(folder, options=""):
    return Setting(folder, source=SERVABLE.replace("{options}", options))


@asynchronous
async def test_a_functions_own_threads_and_tasks_call_the_model(tmp_path):
    async with setting(tmp_path) as s:
        for method in ("of_threads", "of_tasks"):
            for _ in range(3):
                assert (await s.run(method, 5))[0].tolist() == [8 * 5 + 28]


@asynchronous
async def test_a_thread_that_outlives_its_run_does_not_touch_the_state_of_another(tmp_path):
    async with setting(tmp_path, STATEFUL) as s:
        await s.run("leaves_a_thread", 66)
        [pid] = s.pool.pids
        [told] = await s.run("joins", 7)
        assert told.startswith(NOT_ITS_OWN)
        assert told.endswith("; [7]")
        assert [values for _, values, _ in s.models.calls] == [[7]]
        assert s.pool.pids == [pid]


@asynchronous
async def test_a_call_under_way_when_its_function_returns_is_given_up_and_the_next_run_has_its_own(tmp_path):
    async with setting(tmp_path, STATEFUL) as s:
        await s.run("remembers", 66)
        [pid] = s.pool.pids
        s.models.hold.clear()
        path = tmp_path / "go"
        os.mkfifo(path)
        leaving = s.begin("leaves_a_call", str(path))
        await s.models.called.wait()
        # They wait for the process together: the second run is ordered as soon as the first is over.
        next_run = s.begin("joins", 7)
        await asyncio.to_thread(path.write_text, "")
        await leaving
        s.models.hold.set()
        [told] = await next_run
        assert told == "ConfigError: Model.call: the run of the Python stage ended meanwhile; [7]"
        assert s.pool.pids == [pid]


@asynchronous
async def test_a_thread_that_is_kept_needs_the_context_of_the_function_where_there_is_state(tmp_path):
    async with setting(tmp_path, STATEFUL) as s:
        for value in (1, 2):
            assert (await s.run("in_kept_with_context", value))[0].tolist() == [value]
        [told] = await s.run("in_kept", 3)
        assert told.startswith(NOT_ITS_OWN)
        assert "pool.submit(contextvars.copy_context().run, model.call, x)" in told


@asynchronous
async def test_a_thread_that_is_kept_calls_a_model_without_state(tmp_path):
    async with setting(tmp_path) as s:
        for value in (1, 2):
            assert await s.run("in_kept", value) == (f"[{value}]",)


@asynchronous
async def test_a_thread_calls_no_model_while_no_function_runs(tmp_path):
    async with setting(tmp_path) as s:
        await s.run("remembers", 66)
        [pid] = s.pool.pids
        path = tmp_path / "go"
        os.mkfifo(path)
        await s.run("leaves_a_thread_that_tells", str(path))
        await asyncio.to_thread(path.write_text, "")
        told = await asyncio.to_thread(path.read_text)
        assert told.startswith("ConfigError: Model.call: the run of the Python stage that it was made in is over")
        assert (await s.run("of_threads", 5))[0].tolist() == [8 * 5 + 28]
        assert s.pool.pids == [pid]


@asynchronous
async def test_a_process_that_a_stage_forks_has_no_model(tmp_path):
    async with setting(tmp_path) as s:
        for value in range(5):
            [told] = await s.run("forks", value)
            assert told == (
                "ConfigError: Model.call: works in the process of the Python stage, not in one that it forked; "
                f"[{value}]"
            )
        assert all(values[0] < 1000 for _, values, _ in s.models.calls)


@asynchronous
async def test_a_process_that_a_stage_forks_does_not_answer_for_it(tmp_path, capfd):
    async with setting(tmp_path) as s:
        assert (await s.run("comes_back", 7))[0].tolist() == [8]
        [pid] = s.pool.pids
        assert (await s.run("comes_back", 100))[0].tolist() == [101]
        assert s.pool.pids == [pid]
    logged = capfd.readouterr().err
    assert "a process that it forked came back from the function; it is ended" in logged
    assert re.search(r" stages\[\d+\] servable 'net' version 1: ", logged)
    assert "ValueError: in the child" in logged


@asynchronous
async def test_sigterm_ends_what_a_function_starts_and_not_the_process_itself(tmp_path):
    async with setting(tmp_path) as s:
        assert await s.run("ends_its_own", 1) == ("-15 -15",)
        [pid] = s.pool.pids
        os.kill(pid, signal.SIGTERM)
        assert (await s.run("remembers", 1))[0].tolist() == [1]
        assert s.pool.pids == [pid]


def test_when_the_worker_is_gone_the_function_is_told_so_and_not_blamed(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "servable_config.py").write_text(SERVABLE.replace("{options}", ""))
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "shardserve.worker.stages", str(fd)],
            pass_fds=(fd,), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    worker = FrameSocket(ours, stages.ToWorker)
    worker.send(stages.Load(str(tmp_path), "net", 1))
    assert isinstance(worker.receive()[0], stages.Loaded)
    metas, buffers = encode_values((np.array([1]),), "x")
    worker.send(stages.Run(1, "tells", 1, [metas]), buffers)
    assert isinstance(worker.receive()[0], stages.ModelCall)
    worker.close()
    _, logged = process.communicate(timeout=60)
    assert logged == "saw Unavailable: Model.call: the Worker is gone\n"
    assert process.returncode == 0
