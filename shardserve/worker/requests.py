"""Requests from Main: each instance runs through its method's stages, and the results go back in one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import islice
from typing import Any

from shardserve.errors import InvalidInput, NotFound, ShardserveError, StageError, StepError
from shardserve.servable import Method, ModelStage, PythonStage, Servable, Source
from shardserve.wire.frames import Payload, split
from shardserve.wire.messages import front
from shardserve.worker.direct import DirectRequest, model_raised, only_model
from shardserve.worker.model_calls import ModelCalls
from shardserve.worker.replies import MainStream, decode_inputs, errors_answered, reply
from shardserve.worker.sessions import Session
from shardserve.worker.stages.pool import StagePool

Outcome = dict[str, Any] | ShardserveError
"""An instance's outputs, or what is wrong with it alone."""


class Requests:
    """The requests under way of one connection to Main; their numbers are the connection's own."""

    def __init__(self, servable: Servable, models: ModelCalls, python_stages: StagePool) -> None:
        self._servable = servable
        self._models = models
        self._python_stages = python_stages
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._direct: dict[int, DirectRequest] = {}

    def infer(self, stream: MainStream, message: front.Infer, payload: Payload) -> None:
        method = self._servable.methods.get(message.method)
        if method is not None and self._models.known and (stage := only_model(method)) is not None:
            request = DirectRequest(stream, message, method, stage, self._forget)
            self._direct[message.request] = request
            request.start(self._models, payload)
            return
        task = self._loop.create_task(self._answer(stream, message, payload))
        self._tasks[message.request] = task
        task.add_done_callback(lambda _: self._tasks.pop(message.request, None))

    def cancel(self, request: int) -> None:
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()
        direct = self._direct.get(request)
        if direct is not None:
            direct.cancel()

    def cancel_all(self) -> None:
        """Main is gone; it submits again whatever it still needs."""
        for task in list(self._tasks.values()):
            task.cancel()
        for direct in list(self._direct.values()):
            direct.cancel()

    def _forget(self, request: int) -> None:
        self._direct.pop(request, None)

    async def _answer(self, stream: MainStream, message: front.Infer, payload: Payload) -> None:
        with errors_answered(stream, message):
            method = self._servable.methods.get(message.method)
            if method is None:
                raise NotFound(f"servable {self._servable.name!r} has no method {message.method!r}")
            parts = iter(split(payload, [meta.nbytes for instance in message.instances for meta in instance.values()]))
            places = message.places or range(len(message.instances))
            runs = [
                self._outcome(method, instance, list(islice(parts, len(instance))), f"instance {i}", message.deadline)
                for i, instance in zip(places, message.instances, strict=True)
            ]
            # One instance needs no task of its own.
            reply(stream, message, [await runs[0]] if len(runs) == 1 else await _all(runs))

    async def _outcome(
        self, method: Method, metas: front.Instance, parts: list[Payload], where: str, deadline: float | None
    ) -> Outcome:
        """Raises an error that is of the whole request."""
        try:
            return await self._run(method, metas, parts, where, deadline)
        except ShardserveError as error:
            if not error.in_reply:
                raise
            return error

    async def _run(
        self, method: Method, metas: front.Instance, parts: list[Payload], where: str, deadline: float | None
    ) -> dict[str, Any]:
        given = decode_inputs(method, metas, parts, where)
        values: dict[Source, Any] = {Source(0, i): value for i, value in enumerate(given)}
        session = self._models.session()
        try:
            if session is not None:
                await self._models.hold(session)
            for number, stage in enumerate(method.stages, start=1):
                inputs = tuple(values[source] for source in stage.inputs)
                if isinstance(stage, PythonStage):
                    run = self._python_stages.run(method.name, number, stage, inputs, deadline, session)
                else:
                    run = self._run_model(method, stage, inputs, where, deadline, session)
                outputs = await run
                if session is not None:
                    # Also where a function went on after an Aborted: what it made of lost state is no answer.
                    session.check()
                values.update((Source(number, i), output) for i, output in enumerate(outputs))
        finally:
            if session is not None:
                self._models.end(session)
        return {name: values[source] for name, source in zip(method.output_names, method.outputs, strict=True)}

    async def _run_model(
        self,
        method: Method,
        stage: ModelStage,
        inputs: tuple[Any, ...],
        where: str,
        deadline: float | None,
        session: Session | None,
    ) -> tuple[Any, ...]:
        try:
            return await self._models.run(stage.model, 0, inputs, deadline, session)
        except InvalidInput as error:
            makers = [f"{method.stages[source.stage - 1].tag!r}" for source in stage.inputs if source.stage]
            if not makers:
                raise InvalidInput(f"{where}: {error}") from error
            # Not the client's fault alone: a stage made what the model doesn't take.
            gave = f"{', '.join(dict.fromkeys(makers))} gave what {stage.tag!r} doesn't take"
            raise StageError(f"method {method.name!r}, stage {gave}: {error}") from error
        except StepError as error:
            raise model_raised(where, method, stage, error) from error


async def _all(runs: list[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    """Their outcomes; with the first that raises the others are over, too."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
