"""A process for Python stages: runs the servable's functions, one call at a time, as the Worker orders them."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from contextvars import ContextVar
from typing import Any

from shardserve.errors import ConfigError, Unavailable, from_wire
from shardserve.log import servable_in_words, work_for
from shardserve.servable import Model, PythonStage, Servable, load_servable, set_caller
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import Buffer, FrameError, Payload
from shardserve.wire.messages import stages
from shardserve.worker.stages.calling import StageCaller
from shardserve.worker.stages.values import as_results, decode_results, decode_values, encode_values

Connection = FrameSocket[stages.ToProcess]

_run: ContextVar[int] = ContextVar("run")
"""The run that code is of, where its context says so: that of the function itself, and what has a copy of it."""


class StageProcess:
    """EOFError or OSError when the Worker is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pid = os.getpid()
        self._calls = itertools.count(1)
        # `calling` is held while a Model.call awaits its answer, `ending` while it is decided whether the run is over.
        self._calling = threading.Lock()
        self._ending = threading.Lock()
        self._going_on: int | None = None
        self._threads_before: set[threading.Thread] = set()

    def serve(self) -> None:
        """Runs the servable's config, says so, and then whatever the Worker orders."""
        load, _ = self._connection.receive()
        if not isinstance(load, stages.Load):
            raise FrameError(f"{type(load).__name__} came before Load")
        work_for(servable_in_words(load.servable_name, load.version))
        try:
            self._servable = load_servable(load.servable_directory, load.servable_name)
        except ConfigError as error:
            self._connection.send(stages.LoadFailed(str(error)))
            return
        sys.path[:] = self._servable.search_path
        self._stateful = any(model.stateful for model in self._servable.models)
        callers = _callers(self._servable)
        set_caller(self._call)
        self._connection.send(stages.Loaded())
        while True:
            run, payload = self._connection.receive()
            if not isinstance(run, stages.Run):
                raise FrameError(f"{type(run).__name__} came out of turn")
            self._begin(run.run)
            outcomes = callers[run.method, run.stage].outcomes(decode_values(run.instances, payload))
            results, buffers = as_results(outcomes)
            self._finish(stages.Finished(run.run, results), buffers)

    def _begin(self, run: int) -> None:
        _run.set(run)
        self._threads_before = set(threading.enumerate())
        self._going_on = run

    def _finish(self, finished: stages.Finished, buffers: list[Buffer]) -> None:
        with self._ending:
            self._going_on = None
            self._connection.send(finished, buffers)
        # A thread that the function left behind may be in a Model.call. The Worker answers that with an error when it
        # sees `finished`; the next run begins after this answer.
        with self._calling:
            pass

    def _check_run(self) -> None:
        """ConfigError unless a run goes on and, where a run has state, this code is of it: by its context; without one,
        as a new thread is, by its thread, which didn't live before."""
        if self._going_on is None:
            raise ConfigError("Model.call: the run of the Python stage that it was made in is over, or there was none")
        run = _run.get(None)
        here = threading.current_thread() not in self._threads_before if run is None else run == self._going_on
        if self._stateful and not here:
            raise ConfigError(
                "Model.call: this thread is of another run of the Python stage, or of none, and the state is of the "
                "one that goes on; a thread that is kept calls in the context of the function that waits for it: "
                "pool.submit(contextvars.copy_context().run, model.call, x)"
            )

    def _call(self, model: Model, subgraph: int, instances: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """`Model.call`, from whichever thread of a function: one answer is awaited at a time."""
        if os.getpid() != self._pid:
            raise ConfigError("Model.call: works in the process of the Python stage, not in one that it forked")
        encoded = [encode_values(instance, "Model.call: input") for instance in instances]
        buffers: list[Buffer] = [buffer for _, parts in encoded for buffer in parts]
        call = next(self._calls)
        message = stages.ModelCall(call, self._servable.number(model), subgraph, [metas for metas, _ in encoded])
        try:
            with self._calling:
                with self._ending:
                    self._check_run()
                    self._connection.send(message, buffers)
                answer, payload = self._connection.receive()
        except (EOFError, OSError) as error:
            raise Unavailable("Model.call: the Worker is gone") from error
        return self._outputs(call, answer, payload)

    @staticmethod
    def _outputs(call: int, message: stages.ToProcess, payload: Payload) -> list[tuple[Any, ...]]:
        if not isinstance(message, stages.ModelAnswer) or message.call != call:
            raise FrameError(f"{type(message).__name__} came where the answer of Model.call {call} belongs")
        outputs = []
        for i, result in enumerate(decode_results(message.results, payload)):
            if isinstance(result, stages.Failure):
                where = f"instance {i}: " if len(message.results) > 1 else ""
                raise from_wire(result.error, where + result.message)
            outputs.append(result)
        return outputs


def _callers(servable: Servable) -> dict[tuple[str, int], StageCaller]:
    return {
        (method.name, number): StageCaller(stage, f"method {method.name!r}, stage {stage.tag!r}")
        for method in servable.methods.values()
        for number, stage in enumerate(method.stages, start=1)
        if isinstance(stage, PythonStage)
    }
