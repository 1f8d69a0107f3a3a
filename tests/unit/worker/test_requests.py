import asyncio
import time

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.servable import add_stage, declare_distributed, declaring, load_servable, register_method
from shardserve.settings import Settings
from shardserve.wire.messages import TensorMeta, front, stages
from shardserve.worker.model_calls import ModelCalls
from shardserve.worker.requests import Requests
from shardserve.worker.stages.pool import StagePool

from .harness import Cluster, Stream


def servable():
    """`twice` runs the model on its own output; `echo` gives back its input beside the model's output."""
    with declaring("net") as declared:
        model = declare_distributed(1, 1)

        @register_method("y")
        def twice(x):
            return add_stage(model, add_stage(model, x, outputs_count=1), outputs_count=1)

        @register_method(["x", "y"])
        def echo(x):
            return x, add_stage(model, x, outputs_count=1)

    return declared


class Setting:
    def __init__(self, **options):
        self.cluster = Cluster(**options)
        self.main = Stream()
        declared = servable()
        models = ModelCalls(declared, self.cluster.scheduler)
        pool = StagePool(declared, stages.Load("", "net", 1), 1, models, Settings(), lambda: None, lambda reason: None)
        self.requests = Requests(declared, models, pool)

    def infer(self, number, *values, method="twice", places=None, deadline=None):
        arrays = [np.array([value], np.float32) for value in values]
        metas = [{"x": TensorMeta("float32", (1,), 4)} for _ in arrays]
        payload = np.zeros(64 * len(arrays), np.uint8)
        for i, array in enumerate(arrays):
            payload[64 * i : 64 * i + 4] = array.view(np.uint8)
        self.requests.infer(self.main, front.Infer(number, method, metas, deadline, places), payload)

    async def steps(self):
        """What the group is sent next."""
        while not (steps := self.cluster.steps()):
            await asyncio.sleep(0)
        return steps

    async def nothing_more_of_it_runs(self, method):
        """Of a request that has failed. What its tasks gave to the scheduler in this turn may be a step already."""
        for number, values in self.cluster.steps():
            assert method == "twice"
            await asyncio.sleep(0)
            self.cluster.output(number, [0] * len(values))
        self.infer(99, 9, method=method)
        assert [values for _, values in await self.steps()] == [[9]]
        assert self.main.sent == []

    async def answer(self):
        while not self.main.sent:
            await asyncio.sleep(0)
        message, payload = self.main.sent.pop(), self.main.payloads.pop()
        return message, np.frombuffer(payload, np.float32).tolist()


@asynchronous
async def test_stages_feed_each_other():
    s = Setting()
    s.infer(1, 5)
    assert await s.steps() == [(0, [5])]
    s.cluster.output(0, [6])
    assert await s.steps() == [(1, [6])]
    s.cluster.output(1, [7])
    assert await s.answer() == (front.Reply(1, [front.InstanceOutputs({"y": TensorMeta("float32", (1,), 4)})]), [7])


@asynchronous
async def test_outputs_that_are_inputs():
    s = Setting()
    s.infer(1, 5, method="echo")
    await s.steps()
    s.cluster.output(0, [6])
    reply, values = await s.answer()
    assert list(reply.results[0].outputs) == ["x", "y"]
    assert values == [5, 6]


@asynchronous
async def test_instances_are_answered_in_their_order_and_fail_one_by_one():
    s = Setting(window=1)
    s.infer(1, 1, 2, 3, method="echo")
    # All of a request's instances share a batch, also where a step could begin at once.
    assert await s.steps() == [(0, [1, 2, 3])]
    s.cluster.failure(0, "boom")
    s.cluster.output(0, [0, 0, 0])
    assert await s.steps() == [(1, [1])]
    s.cluster.output(1, [10])
    await s.steps()
    s.cluster.failure(2, "boom")
    s.cluster.output(2, [0])
    await s.steps()
    s.cluster.output(3, [30])
    reply, values = await s.answer()
    assert [type(result) for result in reply.results] == [
        front.InstanceOutputs,
        front.InstanceError,
        front.InstanceOutputs,
    ]
    text = "instance 1: method 'echo', 'stage 1': the model raised boom"
    assert reply.results[1] == front.InstanceError("StepError", text)
    assert values == [1, 10, 3, 30]


@asynchronous
async def test_errors_name_the_instance_of_the_clients_request():
    s = Setting(window=1)
    s.infer(1, 1, method="echo", places=(7,))
    await s.steps()
    s.cluster.failure(0, "boom")
    reply, _ = await s.answer()
    assert reply.results[0].message.startswith("instance 7: ")


@pytest.mark.parametrize("method", ["echo", "twice"])
@asynchronous
async def test_a_request_of_which_an_instance_is_refused_fails_at_once(method):
    s = Setting(window=1, settings=Settings(queue_limit=2))
    s.infer(1, 1, 2, 3, method=method)
    message, _ = await s.answer()
    assert message == front.Failed(1, "Overloaded", "2 instances wait already (queue_limit)")
    await s.nothing_more_of_it_runs(method)


@pytest.mark.parametrize("method", ["echo", "twice"])
@asynchronous
async def test_an_error_of_the_server_ends_the_whole_request_and_what_of_it_waits(method):
    s = Setting(window=1, batch=1)
    s.infer(1, 1, 2, 3, method=method)
    assert await s.steps() == [(0, [1])]
    # The first instance is given up with the second generation; the others, and their errors, are nobody's any more.
    s.cluster.lose()
    s.cluster.lose()
    message, _ = await s.answer()
    assert message == front.Failed(1, "Aborted", "2 generations of the group ended while this request ran")
    await s.nothing_more_of_it_runs(method)


@asynchronous
async def test_a_deadline_that_passes_ends_its_whole_request():
    s = Setting(window=1, batch=1)
    s.infer(1, 0, method="echo")
    assert await s.steps() == [(0, [0])]
    s.infer(2, 1, 2, 3, method="echo", deadline=time.monotonic() - 1)
    s.infer(3, 4, method="echo")
    s.cluster.output(0, [0])
    answers = {message.request: message for message in s.main.sent}
    assert sorted(answers) == [1, 2]
    assert answers[2].error == "DeadlineExceeded"
    assert s.cluster.steps() == [(1, [4])]


@pytest.mark.parametrize("method", ["echo", "twice"])
@asynchronous
async def test_a_request_that_is_refused_as_a_whole_is_answered(method):
    s = Setting()
    s.cluster.scheduler.close("the servable is stopped")
    s.infer(1, 1, 2, method=method)
    message, _ = await s.answer()
    assert message == front.Failed(1, "Unavailable", "the servable is stopped")


@pytest.mark.parametrize("method", ["echo", "twice"])
@asynchronous
async def test_a_bug_is_logged_and_not_told(caplog, method):
    s = Setting()
    s.cluster.scheduler.enqueue = None
    s.infer(1, 5, method=method)
    message, _ = await s.answer()
    assert message == front.Failed(1, "InternalError", "an internal error; the server's log has more")
    assert "TypeError" in caplog.text


@asynchronous
async def test_a_bug_in_one_instance_leaves_no_other_under_way():
    s = Setting(window=1)
    enqueue, taken = s.cluster.scheduler.enqueue, []

    def second_fails(call):
        if taken:
            raise ValueError
        taken.append(call)
        enqueue(call)

    s.cluster.scheduler.enqueue = second_fails
    s.infer(1, 5, 6, method="echo")
    message, _ = await s.answer()
    assert message.error == "InternalError"
    assert taken[0].answer.cancelled()
    assert s.cluster.steps() == []


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("method", ["echo", "twice"])
@asynchronous
async def test_cancelled_requests_take_no_further_step(everything, method):
    s = Setting(window=1)
    s.infer(1, 1, method=method)
    assert await s.steps() == [(0, [1])]
    s.infer(2, 2, method=method)
    await asyncio.sleep(0)
    if everything:
        s.requests.cancel_all()
    else:
        s.requests.cancel(1)
        s.requests.cancel(2)
    s.requests.cancel(3)
    await asyncio.sleep(0)
    s.cluster.output(0, [1])
    s.infer(4, 9, method=method)
    assert await s.steps() == [(1, [9])]
    assert s.main.sent == []


STATEFUL = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1, stateful=True)


def generate(x):
    return model.call(model.call(x))


def post(x):
    return x * 2


@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(post, register.add_stage(generate, x, outputs_count=1), outputs_count=1)


@register.register_method(output_names=["y"])
def model_first(x):
    return register.add_stage(post, register.add_stage(model, x, outputs_count=1), outputs_count=1)
"""


async def answer_steps(cluster, value):
    while True:
        while steps := cluster.steps():
            for step, _ in steps:
                cluster.output(step, [value])
        await cluster.sent()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("nothing_left")
@asynchronous
async def test_method_calls_never_wait_for_each_others_group_and_process(tmp_path, processes):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "servable_config.py").write_text(STATEFUL)
    declared = load_servable(str(tmp_path), "net")
    cluster, ready = Cluster(), asyncio.Event()
    models = ModelCalls(declared, cluster.scheduler)
    # They are answered in milliseconds, or would be by this.
    settings = Settings(stage_timeout=5.0)
    load = stages.Load(str(tmp_path), "net", 1)
    pool = StagePool(declared, load, processes, models, settings, ready.set, lambda reason: None)
    pool.start()
    await ready.wait()
    main = Stream()
    requests = Requests(declared, models, pool)
    meta = {"x": TensorMeta("float32", (1,), 4)}
    for number, method in enumerate(["predict", "model_first", "predict", "model_first"]):
        requests.infer(main, front.Infer(number, method, [meta] * 2, None), np.zeros(128, np.uint8))
    answering = asyncio.ensure_future(answer_steps(cluster, 21))
    while len(main.sent) < 4:
        main.said.clear()
        await main.said.wait()
    answering.cancel()
    pool.close("the test is over")
    assert [type(reply) for reply in main.sent] == [front.Reply] * 4
    assert {type(result) for reply in main.sent for result in reply.results} == {front.InstanceOutputs}
    assert {float(y) for payload in main.payloads for y in np.frombuffer(payload, np.float32) if y} == {42}
