"""A process for Python stages: runs the servable's functions, one call at a time, as the Worker orders them."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from shardserve.errors import ConfigError, from_wire
from shardserve.servable import Model, PythonStage, Servable, load_servable, set_caller
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import Buffer, FrameError, Payload
from shardserve.wire.messages import stages
from shardserve.worker.stages.calling import StageCaller
from shardserve.worker.stages.values import as_results, decode_results, decode_values, encode_values

Connection = FrameSocket[stages.ToProcess]


class StageProcess:
    """EOFError or OSError when the Worker is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._calls = itertools.count(1)
        self._calling = threading.Lock()

    def serve(self) -> None:
        """Runs the servable's config, says so, and then whatever the Worker orders."""
        load, _ = self._connection.receive()
        if not isinstance(load, stages.Load):
            raise FrameError(f"{type(load).__name__} came before Load")
        try:
            self._servable = load_servable(load.servable_directory, load.servable_name)
        except ConfigError as error:
            self._connection.send(stages.LoadFailed(str(error)))
            return
        callers = _callers(self._servable)
        set_caller(self._call)
        self._connection.send(stages.Loaded())
        while True:
            run, payload = self._connection.receive()
            if not isinstance(run, stages.Run):
                raise FrameError(f"{type(run).__name__} came out of turn")
            outcomes = callers[run.method, run.stage].outcomes(decode_values(run.instances, payload))
            results, buffers = as_results(outcomes)
            self._connection.send(stages.Finished(run.run, results), buffers)

    def _call(self, model: Model, subgraph: int, instances: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """`Model.call`, from whichever thread of a function: one answer is awaited at a time."""
        encoded = [encode_values(instance, "Model.call: input") for instance in instances]
        buffers: list[Buffer] = [buffer for _, parts in encoded for buffer in parts]
        call = next(self._calls)
        message = stages.ModelCall(call, self._servable.number(model), subgraph, [metas for metas, _ in encoded])
        with self._calling:
            self._connection.send(message, buffers)
            answer, payload = self._connection.receive()
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
