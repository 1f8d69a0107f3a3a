"""A servable as its servable_config.py declares it, and how that file is run."""

from __future__ import annotations

import contextlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shardserve.errors import ConfigError, ShardserveError, described, shortened, text_of
from shardserve.servable.method import Method, PythonStage, trace_method
from shardserve.servable.model import Model, pad_rules

F = TypeVar("F", bound=Callable[..., Any])

MODEL_FORMAT = "shardserve"


@dataclass
class Servable:
    """name: that of the directory that holds servable_config.py. models: one, or several that are not distributed.
    search_path: sys.path as that file had it at its end, where its functions look for what they import when they run.
    """

    name: str
    models: list[Model] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)
    search_path: list[str] = field(default_factory=list)

    @property
    def model(self) -> Model | None:
        """The first: all have the same ranks and stages."""
        return self.models[0] if self.models else None

    @property
    def has_python_stages(self) -> bool:
        return any(isinstance(stage, PythonStage) for method in self.methods.values() for stage in method.stages)

    def add_model(self, model: Model) -> None:
        kinds = {other.declared_by for other in (*self.models, model)}
        if len(kinds) > 1:
            raise ConfigError(f"servable {self.name!r}: {' and '.join(sorted(kinds))} are not for one servable")
        if self.models and model.files is None:
            raise ConfigError(f"servable {self.name!r}: declare_servable is called a second time; once per servable")
        self.models.append(model)

    def number(self, model: Model) -> int:
        """The position of a model among `models`; ConfigError if it is another servable's."""
        for number, own in enumerate(self.models):
            if own is model:
                return number
        raise ConfigError(f"servable {self.name!r}: the model of another servable")

    def add_method(self, method: Method) -> None:
        if method.name in self.methods:
            raise ConfigError(f"servable {self.name!r}: method {method.name!r} is registered a second time")
        self.methods[method.name] = method


_declaring: list[Servable] = []


def current() -> Servable:
    """The servable whose servable_config.py is running."""
    if not _declaring:
        raise ConfigError(
            "a servable is declared in its servable_config.py, which the server runs; this is another file"
        )
    return _declaring[-1]


@contextlib.contextmanager
def declaring(name: str) -> Iterator[Servable]:
    """Within it, declarations go to a servable of this name."""
    servable = Servable(name)
    _declaring.append(servable)
    try:
        yield servable
    finally:
        _declaring.pop()


def declare_distributed(
    rank_size: int,
    stage_size: int,
    with_batch_dim: bool = True,
    without_batch_dim_inputs: int | Sequence[int] | None = None,
    enable_pipeline_infer: bool = True,
    stateful: bool = False,
    max_batch_size: int | None = None,
    max_batch_delay_ms: float = 0,
    pad: Mapping[str, Sequence[Any]] | None = None,
) -> Model:
    """The model of the servable that is being declared; once in each servable_config.py.

    max_batch_size: instances in one step; None for the greatest that was exported. max_batch_delay_ms: how long an
    instance waits at most for others to fill its batch, counted from when it came. pad: input → (dim, value) or (dim,
    value, multiple): instances that differ in this dim (counted without the batch dim) may share a batch; they are
    filled up with `value`, to a multiple of `multiple`, and each one's outputs are cut back to its own length.
    stateful: a method call holds one group of agents for itself from its beginning to its end, unbatched; others
    queue. When that group's generation ends, its state is lost and the holder gets Aborted.
    """
    model = Model(
        rank_size=rank_size,
        stage_size=stage_size,
        with_batch_dim=with_batch_dim,
        without_batch_dim_inputs=_positions(without_batch_dim_inputs),
        enable_pipeline_infer=enable_pipeline_infer,
        stateful=stateful,
        max_batch_size=max_batch_size,
        max_batch_delay_ms=max_batch_delay_ms,
        pad=pad_rules(pad, "declare_servable"),
    )
    current().add_model(model)
    return model


def declare_model(
    model_file: str | Sequence[str],
    model_format: str,
    with_batch_dim: bool = True,
    options: object = None,
    without_batch_dim_inputs: int | Sequence[int] | None = None,
    context: object = None,
    config_file: str | None = None,
) -> Model:
    """A model that is not distributed: exported for one rank, a replica on each device that start_servables gives it.

    model_file: its graph file, or a list of them (its subgraphs), relative to the servable's version folder.
    model_format: "shardserve". A servable may declare several models. options, context and config_file are for
    MindSpore's runtime: ConfigError if given.
    """
    if not isinstance(model_format, str) or model_format.lower() != MODEL_FORMAT:
        raise ConfigError(
            f"declare_model: model_format={model_format!r} is not supported; export the model with `shardserve export` "
            f"and give its graph file as {MODEL_FORMAT!r}"
        )
    for name, value in (("options", options), ("context", context), ("config_file", config_file)):
        if value is not None:
            raise ConfigError(f"declare_model: {name} is for MindSpore's own runtime and is not supported")
    files = tuple(model_file) if isinstance(model_file, list | tuple) else (model_file,)
    if not files or any(not isinstance(file, str) or not file for file in files):
        raise ConfigError(f"declare_model: model_file={model_file!r} is neither a path nor a list of paths")
    model = Model(
        rank_size=1,
        stage_size=1,
        with_batch_dim=with_batch_dim,
        without_batch_dim_inputs=_positions(without_batch_dim_inputs),
        files=files,
        declared_by="declare_model",
    )
    current().add_model(model)
    return model


def _positions(given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    # What isn't a list is checked, and named, by the model as the one position that it would be.
    return tuple(given) if isinstance(given, Sequence) else (given,)


def register_method(output_names: str | Sequence[str]) -> Callable[[F], F]:
    """Decorator: the function becomes a method of the servable, its parameters the names of the inputs.

    The function runs once, now, with placeholders; it returns one of them or a sequence, one per output name.
    """
    names = tuple(output_names) if isinstance(output_names, list | tuple) else (output_names,)
    if not names or any(not isinstance(name, str) or not name for name in names):
        raise ConfigError(f"register_method: output_names={output_names!r} are not names")
    if len(set(names)) != len(names):
        raise ConfigError(f"register_method: output_names={output_names!r} has a name twice")

    def register(function: F) -> F:
        current().add_method(trace_method(function, names))
        return function

    return register


def load_servable(directory: str, name: str) -> Servable:
    """Runs directory/name/servable_config.py. ConfigError says which file and what is wrong with it."""
    path = Path(directory) / name / "servable_config.py"
    if not path.is_file():
        raise ConfigError(f"servable {name!r}: there is no file {path}")
    search_path = list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        with declaring(name) as servable:
            runpy.run_path(str(path), run_name="servable_config")
        servable.search_path = list(sys.path)
    except ShardserveError as error:
        raise ConfigError(f"{path}{_line_in(path, error)}: {shortened(text_of(error))}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}{_line_in(path, error)}: {shortened(described(error))}") from error
    finally:
        sys.path[:] = search_path
    if servable.model is None:
        raise ConfigError(f"{path}: declares no model (distributed.declare_servable or register.declare_model)")
    if not servable.methods:
        raise ConfigError(f"{path}: registers no method (register.register_method)")
    return servable


def _line_in(path: Path, error: BaseException) -> str:
    """Where in this file the error came from, as ", line 7"; nothing if it didn't run that far."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [number for frame, number in frames if frame.f_code.co_filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
