"""Methods: tracing runs a function once with placeholders, in which `add_stage` records what is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardserve.errors import ConfigError
from shardserve.servable.model import Model


@dataclass(frozen=True)
class Source:
    """Where a value of a method comes from: stage 0 is the method's inputs, stage n the n-th `add_stage`."""

    stage: int
    index: int


@dataclass(frozen=True)
class ModelStage:
    """A stage that runs a model's first subgraph."""

    model: Model
    inputs: tuple[Source, ...]
    outputs_count: int
    tag: str


@dataclass(frozen=True)
class PythonStage:
    """A stage that runs a function. batch_size: None calls it with one instance's values; else with a list of
    instances, each a tuple of its values: at most `batch_size`, or for 0 as many as the server chooses."""

    function: Callable[..., Any]
    batch_size: int | None
    inputs: tuple[Source, ...]
    outputs_count: int
    tag: str


MethodStage = ModelStage | PythonStage


@dataclass(frozen=True)
class Method:
    name: str
    inputs: tuple[str, ...]
    output_names: tuple[str, ...]
    outputs: tuple[Source, ...]
    stages: tuple[MethodStage, ...]


@dataclass
class _Trace:
    method: str
    stages: list[MethodStage] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Placeholder:
    """Stands for a value while a method is traced; only its own trace may use it. There is no value to compute with:
    what asks for one would be decided once, here, for every instance that ever comes, so it is an error."""

    source: Source
    trace: _Trace
    what: str

    def __getattr__(self, name: str) -> Any:
        # Python and its libraries ask any object for names of this kind, and take it that there is none.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise _has_no_value(self, f".{name}")


def _has_no_value(placeholder: _Placeholder, asked: str) -> ConfigError:
    return ConfigError(
        f"method {placeholder.trace.method!r}: {asked} of {placeholder.what}: a method's function is traced once, with "
        "placeholders that have no value, so it can't compute or decide anything: put that into a Python function and "
        "add_stage the function"
    )


def _refusing(asked: str) -> Callable[..., Any]:
    def refuse(self: _Placeholder, *_: object, **__: object) -> Any:
        raise _has_no_value(self, asked)

    return refuse


_NAMED = {
    "the truth": "bool",
    "len()": "len",
    "iteration": "iter reversed",
    "'in'": "contains",
    "[]": "getitem setitem delitem",
    "the array": "array",
    "the text": "format str",
    "the number": "int float complex index round",
    "comparison": "eq ne lt le gt ge",
    "arithmetic": "neg pos invert abs divmod rdivmod",
}
_BINARY = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
_ASKED = {
    **{name: asked for asked, names in _NAMED.items() for name in names.split()},
    **{f"{side}{name}": "arithmetic" for side in ("", "r", "i") for name in _BINARY.split()},
}
for _operator, _what in _ASKED.items():
    setattr(_Placeholder, f"__{_operator}__", _refusing(_what))


_tracing: list[_Trace] = []


def add_stage(
    stage: Model | Callable[..., Any],
    *args: Any,
    outputs_count: int,
    batch_size: int | None = None,
    tag: str | None = None,
) -> Any:
    """Adds a method stage that runs `stage` on `args`: placeholders of the method being traced.

    A function gets one instance's values with batch_size None; else a list of instances, each a tuple of its values (at
    most batch_size; 0: as many as the server chooses), and returns or yields one result per instance. A result is a
    numpy array, number, str or bytes, or with outputs_count of more than 1 a tuple of those.

    Returns one placeholder, or a tuple of them if `outputs_count` is more than 1.
    """
    if not _tracing:
        raise ConfigError("add_stage: called outside of a method that register_method traces")
    trace = _tracing[-1]
    where = f"add_stage {len(trace.stages) + 1} of method {trace.method!r}"
    if not isinstance(stage, Model):
        _check_function(stage, batch_size, where)
    elif batch_size is not None:
        raise ConfigError(f"{where}: batch_size is for Python functions; a model's is its max_batch_size")
    if not isinstance(outputs_count, int) or isinstance(outputs_count, bool) or outputs_count < 1:
        raise ConfigError(f"{where}: outputs_count={outputs_count!r} is not an integer of at least 1")
    if tag is not None and (not isinstance(tag, str) or not tag):
        raise ConfigError(f"{where}: tag={tag!r} is not a name")
    for position, value in enumerate(args):
        if not isinstance(value, _Placeholder) or value.trace is not trace:
            raise ConfigError(f"{where}: argument {position} is no input of the method and no output of a stage of it")
    if not args:
        raise ConfigError(f"{where}: takes no values: a stage has at least one argument")
    inputs = tuple(value.source for value in args)
    added: MethodStage
    if isinstance(stage, Model):
        added = ModelStage(stage, inputs, outputs_count, tag or f"stage {len(trace.stages) + 1}")
    else:
        default = getattr(stage, "__name__", f"stage {len(trace.stages) + 1}")
        added = PythonStage(stage, batch_size, inputs, outputs_count, tag or default)
    trace.stages.append(added)
    outputs = tuple(
        _Placeholder(Source(len(trace.stages), i), trace, f"output {i} (of {outputs_count}) of stage {added.tag!r}")
        for i in range(outputs_count)
    )
    return outputs[0] if outputs_count == 1 else outputs


def _check_function(stage: object, batch_size: object, where: str) -> None:
    if not callable(stage):
        raise ConfigError(f"{where}: stage={stage!r} is neither a declared model nor a function")
    if inspect.iscoroutinefunction(stage) or inspect.isasyncgenfunction(stage):
        raise ConfigError(
            f"{where}: async functions can't be stages; a stage runs in a process of its own and may wait"
        )
    integer = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size is not None and not (integer and batch_size >= 0):  # type: ignore[operator]
        raise ConfigError(f"{where}: batch_size={batch_size!r} is neither None nor an integer of at least 0")


def trace_method(function: Callable[..., Any], output_names: tuple[str, ...]) -> Method:
    """Runs the function once with placeholders; ConfigError where it isn't made of `add_stage` calls alone."""
    name = function.__name__
    inputs = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise ConfigError(
                f"method {name!r}: parameter {parameter} is not a plain name; a method has no *args, "
                "**kwargs, keyword-only parameters or defaults"
            )
        inputs.append(parameter.name)
    trace = _Trace(name)
    _tracing.append(trace)
    try:
        result = function(*(_Placeholder(Source(0, i), trace, f"input {own!r}") for i, own in enumerate(inputs)))
    finally:
        _tracing.pop()
    outputs = result if isinstance(result, tuple | list) else (result,)
    for position, value in enumerate(outputs):
        if not isinstance(value, _Placeholder) or value.trace is not trace:
            raise ConfigError(f"method {name!r}: output {position} is no output of a stage and no input of the method")
    if len(outputs) != len(output_names):
        raise ConfigError(f"method {name!r}: returns {len(outputs)} outputs for {len(output_names)} output_names")
    if not trace.stages:
        raise ConfigError(f"method {name!r}: has no add_stage")
    return Method(
        name=name,
        inputs=tuple(inputs),
        output_names=output_names,
        outputs=tuple(value.source for value in outputs),
        stages=tuple(trace.stages),
    )
