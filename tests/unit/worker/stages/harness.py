"""A pool of real processes whose servable has a function for each thing that may go wrong; its model is scripted."""

import asyncio
import contextlib
import resource

import numpy as np

from shardserve.errors import Aborted, InvalidInput
from shardserve.servable import load_servable
from shardserve.settings import Settings
from shardserve.wire.messages import stages
from shardserve.worker.stages.pool import StagePool

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
    def __init__(self, directory, size=1, source=SERVABLE, first_start=True, **settings):
        (directory / "net").mkdir()
        (directory / "net" / "servable_config.py").write_text(source)
        self.servable = load_servable(str(directory), "net")
        self.models = Models()
        self.said = asyncio.Queue()
        settings = Settings(**settings)
        self.pool = StagePool(
            self.servable,
            stages.Load(str(directory), "net", 1),
            size,
            self.models,
            settings,
            lambda: self.said.put_nowait("ready"),
            lambda reason: self.said.put_nowait(reason),
            first_start,
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
