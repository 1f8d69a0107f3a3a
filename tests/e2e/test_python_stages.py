"""Methods with Python stages in a whole server: what dies, hangs or is wrong takes nothing else along."""

import concurrent.futures
import contextlib
import json
import os
import select
import signal

import numpy as np
import pytest
import torch
from serving import Up
from torch.export import Dim

from shardserve.client import Client, status
from shardserve.export import export

SERVABLE = """
import os
import time

import numpy as np

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1{options})


def prepare(x):
    mode = int(x[0])
    if mode == 101:
        raise ValueError("not 101")
    if mode == 102:
        os._exit(9)
    if mode == 103:
        with open(os.environ["HANGS"], "wb", 0) as hangs:
            hangs.write(b".")
        time.sleep(1000)
    if mode == 104:
        return x.astype(np.float64)
    return x


def finish(instances):
    return [(y, y.sum()) for (y,) in instances]


def loop(x, count):
    for _ in range(int(count[0])):
        x = model.call(x)
    return x


def loop_for_ever(x):
    x = model.call(x)
    # A FIFO: opened when the test reads it.
    with open(os.environ["BEGUN"], "w"):
        pass
    while True:
        x = model.call(x)


def pause(until):
    # FIFOs, which the test holds open.
    with open(os.environ["HERE"], "wb", 0) as here, open(os.environ[until], "rb", 0) as go_on:
        here.write(b".")
        go_on.read(1)


def step_between_pauses(x):
    pause("FIRST")
    x = model.call(x)
    pause("SECOND")
    return x


@register.register_method(output_names=["y", "sum"])
def around(x):
    y = register.add_stage(model, register.add_stage(prepare, x, outputs_count=1), outputs_count=1)
    return register.add_stage(finish, y, outputs_count=2, batch_size=8)


@register.register_method(output_names=["y"])
def twice(x):
    return register.add_stage(model, register.add_stage(model, x, outputs_count=1), outputs_count=1)


@register.register_method(output_names=["y"])
def repeat(x, count):
    return register.add_stage(loop, x, count, outputs_count=1)


@register.register_method(output_names=["y"])
def endless(x):
    return register.add_stage(loop_for_ever, x, outputs_count=1)


@register.register_method(output_names=["y"])
def paused(x):
    return register.add_stage(step_between_pauses, x, outputs_count=1)
"""


class Fifo:
    """Both ends, so that neither opening it nor reading it depends on who else has it open."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self.end = os.open(path, os.O_RDWR)

    def take(self):
        """The next byte that somebody writes."""
        ready, _, _ = select.select([self.end], [], [], 60)
        assert ready
        os.read(self.end, 1)

    def give(self, count):
        os.write(self.end, b"." * count)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        os.close(self.end)


class AddOne(torch.nn.Module):
    """x float32 [batch, 4] → float32 [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.one


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("add_one") / "model"
    shapes = {"x": {0: Dim("batch", min=1, max=8)}}
    export(AddOne(), (torch.ones(2, 4),), name="net", out=folder, dynamic_shapes=shapes, output_names=["y"])
    return folder


def up(folder, model_dir, options="", *arguments, **environment):
    (folder / "net").mkdir()
    (folder / "net" / "servable_config.py").write_text(SERVABLE.replace("{options}", options))
    return Up(folder, model_dir, "net", *arguments, SHARDSERVE_STAGE_GRACE="0.1", **environment)


@pytest.fixture(scope="module")
def hangs(tmp_path_factory):
    """Says when a stage has begun to hang."""
    with Fifo(tmp_path_factory.mktemp("hangs") / "hangs") as fifo:
        yield fifo


@pytest.fixture(scope="module")
def served(model_dir, hangs, tmp_path_factory):
    with up(tmp_path_factory.mktemp("stages"), model_dir, HANGS=str(hangs.path)) as server:
        yield server
        assert server.stop() == 0


def x(value):
    return {"x": np.full(4, value, np.float32)}


def ask(served, method, *instances, timeout=60, **options):
    with Client(served.grpc, "net", method, **options) as client:
        return client.infer(list(instances), timeout=timeout)


def test_stages_before_and_after_the_model(served):
    answers = ask(served, "around", *map(x, range(20)), raise_errors=True)
    assert [answer["y"].tolist() for answer in answers] == [[value + 1.0] * 4 for value in range(20)]
    assert [float(answer["sum"]) for answer in answers] == [4 * (value + 1.0) for value in range(20)]


def test_several_model_stages(served):
    [answer] = ask(served, "twice", x(5), raise_errors=True)
    assert answer["y"].tolist() == [7] * 4


def test_errors_are_of_their_instances(served):
    good, raised, died, wrong, last = ask(served, "around", x(1), x(101), x(102), x(104), x(2))
    assert (good["y"][0], last["y"][0]) == (2, 3)
    assert raised == {"error": "method 'around', stage 'prepare': ValueError: not 101"}
    assert "method 'around', stage 'prepare': its process (pid " in died["error"]
    assert died["error"].endswith("ended with code 9")
    assert wrong["error"] == (
        "method 'around', stage 'prepare' gave what 'stage 2' doesn't take: "
        "input 'x' must have dtype float32, got float64"
    )


def test_a_wrong_input_of_the_client_is_the_clients_fault(served):
    answer = ask(served, "twice", {"x": np.ones(3, np.float32)})
    assert "instance 0: input 'x' must have size 4 at axis 0, got 3" in str(answer)


def test_a_stage_that_hangs_past_its_deadline_is_replaced(served, hangs):
    [before] = served.of("shardserve.worker.stages")
    answer = ask(served, "around", x(103), timeout=2)
    assert answer["error"].startswith("DEADLINE_EXCEEDED")
    hangs.take()
    [after] = ask(served, "around", x(1))
    assert after["y"][0] == 2
    assert served.of("shardserve.worker.stages") != [before]


def test_a_method_without_python_stages_does_not_wait_for_one_that_hangs(served, hangs):
    with Client(served.grpc, "net", "around") as client:
        # Until its client leaves, or forgets it.
        hanging_call = client.infer_async(x(103), timeout=60)
        hangs.take()
        [process] = served.of("shardserve.worker.stages")
        for value in range(50):
            [answer] = ask(served, "twice", x(value), timeout=60)
            assert answer["y"][0] == value + 2
        assert served.of("shardserve.worker.stages") == [process]
        del hanging_call


def test_model_call(served):
    answers = ask(served, "repeat", {**x(0), "count": 3}, {**x(5), "count": 1}, raise_errors=True)
    assert [answer["y"][0] for answer in answers] == [3, 6]
    bad = ask(served, "repeat", {"x": np.ones(5, np.float32), "count": 1}, x(1) | {"count": 1})
    assert "method 'repeat', stage 'loop': InvalidInput: input 'x' must have size 4" in bad[0]["error"]
    assert bad[1]["y"][0] == 2


def test_a_worker_that_dies_takes_its_stage_processes_along_and_requests_go_on(served):
    [before] = served.of("shardserve.worker.stages")
    [worker] = served.of("shardserve.worker ")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask, served, "repeat", {**x(0), "count": 2000})
        os.kill(worker, signal.SIGKILL)
        assert answers.result()[0]["y"][0] == 2000
    assert before not in served.of("shardserve.worker.stages")


def test_a_stateful_method_call_is_aborted_when_its_group_ends_and_others_are_answered(model_dir, tmp_path):
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    with up(tmp_path, model_dir, ", stateful=True", BEGUN=str(begun)) as server:
        [pid] = server.pids()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            holder = pool.submit(ask, server, "endless", x(0))
            # A death before its first step would cost it nothing.
            with begun.open():
                pass
            assert "error" in ask(server, "twice", x(1), timeout=0.5)
            waiting = pool.submit(ask, server, "twice", x(1))
            os.kill(pid, signal.SIGKILL)
            assert holder.result()["error"].startswith("ABORTED")
            assert waiting.result()[0]["y"][0] == 3


def test_a_stateful_method_call_loses_nothing_by_a_death_before_its_first_step(model_dir, tmp_path):
    """Its replica's: the other one is held by a method call that may wait for this one's process."""
    devices = [{"device_id": str(rank), "device_ip": "127.0.0.1", "rank_id": str(rank)} for rank in range(2)]
    table = {"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}
    (tmp_path / "ranks.json").write_text(json.dumps(table))
    arguments = ("--rank-table", str(tmp_path / "ranks.json"), "--num-parallel-workers", "2")
    with contextlib.ExitStack() as stack:
        here, first, second = (stack.enter_context(Fifo(tmp_path / name)) for name in ("here", "first", "second"))
        fifos = {"HERE": str(here.path), "FIRST": str(first.path), "SECOND": str(second.path)}
        server = stack.enter_context(up(tmp_path, model_dir, ", stateful=True", *arguments, **fifos))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
        # Also where the test fails: nobody is kept waiting.
        for fifo in (first, second):
            stack.callback(fifo.give, 2)
        calls = [pool.submit(ask, server, "paused", x(value)) for value in range(2)]
        here.take()
        here.take()
        replicas = status(server.grpc)["servables"][0]["replicas"]
        agents = [rank["pid"] for replica in replicas for rank in replica["ranks"]]
        [fork_server] = set(server.of("shardserve.agent.fork_server")) - set(agents)
        os.kill(fork_server, signal.SIGSTOP)
        os.kill(agents[0], signal.SIGKILL)
        while server.replica()["state"] == "serving":
            pass
        first.give(2)
        here.take()
        # The other one waits for its group.
        os.kill(fork_server, signal.SIGCONT)
        here.take()
        second.give(2)
        assert [call.result()[0]["y"][0] for call in calls] == [1, 2]
