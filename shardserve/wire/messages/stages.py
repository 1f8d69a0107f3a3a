"""A Worker and one of its processes for Python stages, over the socketpair that the process inherits.

The first message is `Load`, answered by `Loaded` or `LoadFailed`. Then one `Run` at a time, answered by `Finished`; in
between, `ModelCall`s the other way, one at a time, each answered by `ModelAnswer`: one that is under way when
`Finished` comes, before the next `Run`. Payloads hold the values of all instances that have some, in order. The end of
the connection ends the process.
"""

from __future__ import annotations

from shardserve.wire.messages import Message, TensorMeta

Values = tuple[TensorMeta, ...]
"""The values of one instance: its inputs of a stage or model, or its outputs."""


class Load(Message, frozen=True):
    """The process runs this servable's servable_config.py itself."""

    servable_directory: str
    servable_name: str
    version: int


class Loaded(Message, frozen=True):
    pass


class LoadFailed(Message, frozen=True):
    message: str


class Failure(Message, frozen=True):
    """Why one instance has no outputs. error: a class name of shardserve.errors."""

    error: str
    message: str


class Outputs(Message, frozen=True):
    values: Values


Result = Outputs | Failure


class Run(Message, frozen=True):
    """One call of a Python stage: the `stage`-th (from 1) of this method."""

    run: int
    method: str
    stage: int
    instances: list[Values]


class Finished(Message, frozen=True):
    """One result per instance of the run."""

    run: int
    results: list[Result]


class ModelCall(Message, frozen=True):
    """From inside a stage. model: its position in the servable. subgraph: of that model."""

    call: int
    model: int
    subgraph: int
    instances: list[Values]


class ModelAnswer(Message, frozen=True):
    call: int
    results: list[Result]


ToProcess = Load | Run | ModelAnswer
ToWorker = Loaded | LoadFailed | Finished | ModelCall
