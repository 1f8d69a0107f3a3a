"""Requests whose method is one model stage and nothing else: they need no task, and no turn of the loop, to go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from shardserve.errors import InternalError, InvalidInput, ShardserveError, StepError
from shardserve.servable import Method, ModelStage
from shardserve.wire.frames import Payload, split
from shardserve.wire.messages import front
from shardserve.worker.answer import Answer
from shardserve.worker.calls import Call
from shardserve.worker.model_calls import ModelCalls
from shardserve.worker.replies import MainStream, decode_inputs, errors_answered, refuse, reply

UNANSWERED = InternalError("an instance without an answer")


def only_model(method: Method) -> ModelStage | None:
    """The stage of a method that is one call of a model without state."""
    [*others, stage] = method.stages
    return stage if not others and isinstance(stage, ModelStage) and not stage.model.stateful else None


def model_raised(where: str, method: Method, stage: ModelStage, error: StepError) -> StepError:
    """The agents' error as clients are told it."""
    return StepError(f"{where}: method {method.name!r}, {stage.tag!r}: the model raised {error}")


class DirectRequest:
    """`ended` is called with the request's number when it is answered or cancelled."""

    def __init__(
        self,
        stream: MainStream,
        message: front.Infer,
        method: Method,
        stage: ModelStage,
        ended: Callable[[int], None],
    ) -> None:
        self._stream = stream
        self._message = message
        self._method = method
        self._stage = stage
        self._results: list[dict[str, Any] | ShardserveError] = [UNANSWERED] * len(message.instances)
        self._calls: dict[int, Call] = {}
        self._given: dict[int, list[Any]] = {}
        self._cancelled = False
        self._places = message.places or range(len(message.instances))
        self._ended = ended

    def start(self, models: ModelCalls, payload: Payload) -> None:
        """Submits a call for each instance; replies at once if none of them can run, or one is refused."""
        instances = self._message.instances
        started = False
        with errors_answered(self._stream, self._message):
            parts = iter(split(payload, [meta.nbytes for instance in instances for meta in instance.values()]))
            for i, instance in enumerate(instances):
                self._start_instance(models, i, instance, list(islice(parts, len(instance))))
            started = True
        if not started:
            self.cancel()
            return
        if not self._calls:
            self._reply()
            return
        # After all calls are made: a call that is over already is answered within this line.
        for i, call in list(self._calls.items()):
            call.answer.add_done_callback(partial(self._answered, i))
        models.start()

    def _start_instance(self, models: ModelCalls, i: int, metas: front.Instance, parts: list[Payload]) -> None:
        where = f"instance {self._places[i]}"
        try:
            given = decode_inputs(self._method, metas, parts, where)
            inputs = tuple([given[source.index] for source in self._stage.inputs])
            try:
                call = models.call(self._stage.model, 0, inputs, self._message.deadline)
            except InvalidInput as error:
                raise InvalidInput(f"{where}: {error}") from error
            models.enqueue(call)
        except ShardserveError as error:
            if not error.in_reply:
                raise
            self._results[i] = error
        else:
            self._calls[i] = call
            self._given[i] = given

    def _answered(self, i: int, answer: Answer[tuple[Any, ...]]) -> None:
        del self._calls[i]
        given = self._given.pop(i)
        if self._cancelled:
            return
        try:
            outputs = answer.result()
            names = zip(self._method.output_names, self._method.outputs, strict=True)
            self._results[i] = {name: (outputs if at.stage else given)[at.index] for name, at in names}
        except StepError as error:
            self._results[i] = model_raised(f"instance {self._places[i]}", self._method, self._stage, error)
        except ShardserveError as error:
            if not error.in_reply:
                # The whole request has failed with it.
                self.cancel()
                refuse(self._stream, self._message, error)
                return
            self._results[i] = error
        if not self._calls:
            self._reply()

    def _reply(self) -> None:
        self._ended(self._message.request)
        with errors_answered(self._stream, self._message):
            reply(self._stream, self._message, self._results)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled = True
        self._ended(self._message.request)
        for call in list(self._calls.values()):
            call.answer.cancel()
