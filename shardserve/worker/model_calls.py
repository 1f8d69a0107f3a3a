"""Calls of the servable's models: by a method's stages, and by its Python functions with `Model.call`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardserve.errors import ConfigError, InvalidInput
from shardserve.servable import Model, Servable
from shardserve.shards.config import Signature
from shardserve.worker.answer import Answer
from shardserve.worker.batching import Batching
from shardserve.worker.calls import Array, Call
from shardserve.worker.scheduler import Scheduler
from shardserve.worker.sessions import Session


def program_number(servable: Servable, model: Model, subgraph: int) -> int:
    """The position of a model's subgraph among the programs that each agent has."""
    before = servable.models[: servable.number(model)]
    return sum(len(other.files or ()) for other in before) + subgraph


def model_batchings(servable: Servable, signatures: Sequence[Signature]) -> list[Batching]:
    """One for each program of an agent. ConfigError if a signature doesn't fit what its model declares."""
    owners = [model for model in servable.models for _ in model.files or signatures]
    batchings = [Batching(model, signature) for model, signature in zip(owners, signatures, strict=True)]
    for model in servable.models:
        asked = model.max_batch_size
        # Of several subgraphs, some may take fewer.
        largest = max(
            batching.exported_size for batching, owner in zip(batchings, owners, strict=True) if owner is model
        )
        if asked is not None and asked > largest:
            raise ConfigError(
                f"max_batch_size={asked} is more than the {largest} that the model was exported for; export it with a "
                "larger maximum of the batch dim"
            )
    return batchings


class ModelCalls:
    """Makes calls of instances and gives them to the scheduler."""

    def __init__(self, servable: Servable, scheduler: Scheduler) -> None:
        self._servable = servable
        self._scheduler = scheduler

    def session(self) -> Session | None:
        """For one method call of a stateful servable; `hold` its group before anything else, and `end` it."""
        return Session() if any(model.stateful for model in self._servable.models) else None

    async def hold(self, session: Session) -> None:
        """Returns when it has a group; Overloaded or Unavailable if it gets none."""
        await self._scheduler.hold(session)

    def end(self, session: Session) -> None:
        self._scheduler.release(session)

    @property
    def known(self) -> bool:
        """Whether the agents' signatures are known, so that `call` works."""
        return self._scheduler.known_models is not None

    def call(
        self, model: Model, subgraph: int, values: Sequence[Any], deadline: float | None, session: Session | None = None
    ) -> Call:
        """One instance's call, for `enqueue`. InvalidInput if the model doesn't take these values."""
        batchings = self._scheduler.known_models
        assert batchings is not None
        number = program_number(self._servable, model, subgraph)
        count = len(model.files or batchings)
        if subgraph >= count:
            raise InvalidInput(f"subgraph={subgraph}: the model has {count}, numbered from 0")
        batching = batchings[number]
        batching.check_count(len(values))
        arrays = batching.inputs(values)
        key = batching.key(arrays)
        return Call(arrays, key, deadline, Answer(), number, session, lengths=batching.lengths(arrays))

    def enqueue(self, call: Call) -> None:
        """Overloaded or Unavailable if it isn't taken; `start` when all are there that may share a batch."""
        self._scheduler.enqueue(call)

    def start(self) -> None:
        self._scheduler.pump()

    async def run(
        self, model: Model, subgraph: int, values: Sequence[Any], deadline: float | None, session: Session | None
    ) -> tuple[Array, ...]:
        """One instance's outputs. InvalidInput if the model doesn't take these values."""
        await self._scheduler.models_known()
        call = self.call(model, subgraph, values, deadline, session)
        self._scheduler.submit(call)
        return await call.answer
