"""The models of a servable: what `distributed.declare_servable` and `register.declare_model` say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardserve.errors import ConfigError

Caller = Callable[["Model", int, list[tuple[Any, ...]]], list[tuple[Any, ...]]]
"""Runs instances through a model's subgraph; gives each one's outputs, in order."""

_caller: Caller | None = None


def set_caller(caller: Caller) -> None:
    """What `Model.call` calls in this process: only one that runs Python stages has it."""
    global _caller
    _caller = caller


class PadRule(NamedTuple):
    """How an input is padded so that instances of different size share a batch.

    axis: of an instance, without the batch dim. value: what it is filled up with. multiple: of which the padded size is
    one.
    """

    axis: int
    value: int | float | bool
    multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model cut into rank_size shards: stage_size pipeline stages of rank_size / stage_size tensor-parallel ranks.

    with_batch_dim: the model's tensors have a batch dim in front that instances don't have: the Worker stacks and
    splits. without_batch_dim_inputs: positions of the inputs that have none nevertheless. enable_pipeline_infer:
    several steps are in flight at once. max_batch_size: None takes the exported batch dim's greatest value.
    max_batch_delay_ms: how long an instance waits for others to fill its batch while the agents could take it. pad: the
    inputs that are padded. stateful: a method call holds one group for itself from its beginning to its end,
    unbatched.

    files: of a model that is not distributed the graph files, one a subgraph, relative to the servable's version
    folder; None where `startup_agents` names them. declared_by: the function that made it, for messages.
    """

    rank_size: int
    stage_size: int
    with_batch_dim: bool = True
    without_batch_dim_inputs: tuple[int, ...] = ()
    enable_pipeline_infer: bool = True
    max_batch_size: int | None = None
    max_batch_delay_ms: float = 0
    pad: Mapping[str, PadRule] = field(default_factory=dict)
    stateful: bool = False
    files: tuple[str, ...] | None = None
    declared_by: str = "declare_servable"

    def __post_init__(self) -> None:
        where = self.declared_by
        for name in ("rank_size", "stage_size"):
            if not _is_integer(getattr(self, name), least=1):
                raise ConfigError(f"{where}: {name}={getattr(self, name)!r} is not an integer of at least 1")
        if self.rank_size % self.stage_size:
            raise ConfigError(f"{where}: rank_size={self.rank_size} is not a multiple of stage_size={self.stage_size}")
        for name in ("with_batch_dim", "enable_pipeline_infer", "stateful"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{where}: {name}={getattr(self, name)!r} is not a bool")
        if not all(_is_integer(i, least=0) for i in self.without_batch_dim_inputs):
            raise ConfigError(
                f"{where}: without_batch_dim_inputs={self.without_batch_dim_inputs!r}: not positions of inputs"
            )
        if self.without_batch_dim_inputs and not self.with_batch_dim:
            raise ConfigError(f"{where}: without_batch_dim_inputs needs with_batch_dim=True")
        size = self.max_batch_size
        if size is not None and not _is_integer(size, least=1):
            raise ConfigError(f"{where}: max_batch_size={size!r} is not an integer of at least 1")
        if size is not None and not self.with_batch_dim:
            raise ConfigError(f"{where}: max_batch_size needs with_batch_dim=True")
        delay = self.max_batch_delay_ms
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < math.inf:
            raise ConfigError(f"{where}: max_batch_delay_ms={delay!r} is not a number of milliseconds of at least 0")
        for name, given in (("max_batch_delay_ms", delay), ("pad", self.pad)):
            if given and (self.stateful or not self.with_batch_dim):
                raise ConfigError(f"{where}: {name} is for a model with_batch_dim=True that isn't stateful")

    def call(self, *args: Any, subgraph: int = 0) -> Any:
        """Runs the model from inside a Python stage and waits for its outputs.

        args: the inputs of one instance; gives its output, or a tuple of them if the subgraph has several. Or one list
        of instances, each a tuple of its inputs; gives a list of tuples of outputs. subgraph: which of the model's,
        from 0. Raises what a client would be answered with: InvalidInput, StepError, DeadlineExceeded, Aborted, …; and
        ConfigError outside of the stage's run, as in a thread that outlived it or a process that it forked.
        """
        if not _is_integer(subgraph, least=0):
            raise ConfigError(f"Model.call: subgraph={subgraph!r} is not an integer of at least 0")
        if not args:
            raise ConfigError("Model.call: is given no inputs")
        instances, single = _instances(args)
        if _caller is None:
            raise ConfigError("Model.call: works inside a Python stage only (register.add_stage of a function)")
        results = _caller(self, subgraph, instances)
        if not single:
            return results
        return results[0][0] if len(results[0]) == 1 else results[0]


def _instances(args: tuple[Any, ...]) -> tuple[list[tuple[Any, ...]], bool]:
    """The instances that `Model.call` was given, and whether it was one by its inputs."""
    if len(args) > 1 or not isinstance(args[0], list | tuple):
        return [args], True
    instances: Sequence[Any] = args[0]
    for i, instance in enumerate(instances):
        if not isinstance(instance, list | tuple):
            raise ConfigError(
                f"Model.call: instance {i} is a {type(instance).__name__}; each is a tuple of that instance's inputs"
            )
    return [tuple(instance) for instance in instances], False


def pad_rules(pad: Mapping[str, Sequence[Any]] | None, where: str) -> dict[str, PadRule]:
    """`pad` as declared: input → (dim, value) or (dim, value, multiple). ConfigError begins with `where`."""
    if pad is None:
        return {}
    if not isinstance(pad, Mapping):
        raise ConfigError(f"{where}: pad={pad!r} is not a dict of input: (dim, value[, multiple])")
    rules: dict[str, PadRule] = {}
    for name, given in pad.items():
        if not isinstance(name, str) or not isinstance(given, list | tuple) or len(given) not in (2, 3):
            raise ConfigError(f"{where}: pad={{{name!r}: {given!r}}}: expected input: (dim, value[, multiple])")
        rule = PadRule(*given)
        if not _is_integer(rule.axis, least=0):
            raise ConfigError(f"{where}: pad={{{name!r}: …}}: {rule.axis!r} is not a dim of an instance, from 0")
        if not isinstance(rule.value, int | float):
            raise ConfigError(f"{where}: pad={{{name!r}: …}}: {rule.value!r} is neither a number nor a bool")
        if not _is_integer(rule.multiple, least=1):
            raise ConfigError(f"{where}: pad={{{name!r}: …}}: {rule.multiple!r} is not a multiple of at least 1")
        rules[name] = rule
    return rules


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
