"""A servable as its servable_config.py declares it, and how that file is run."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shardserve.errors import ConfigError, ShardserveError
from shardserve.servable.method import Method, trace_method
from shardserve.servable.model import Model

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Servable:
    """name: that of the directory that holds servable_config.py."""

    name: str
    model: Model | None = None
    methods: dict[str, Method] = field(default_factory=dict)

    def add_model(self, model: Model) -> None:
        if self.model is not None:
            raise ConfigError(f"servable {self.name!r}: declare_servable is called a second time; once per servable")
        self.model = model

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
    max_batch_size: int | None = None,
) -> Model:
    """The model of the servable that is being declared; once in each servable_config.py."""
    if without_batch_dim_inputs is None:
        positions: tuple[int, ...] = ()
    elif isinstance(without_batch_dim_inputs, int):
        positions = (without_batch_dim_inputs,)
    else:
        positions = tuple(without_batch_dim_inputs)
    model = Model(
        rank_size=rank_size,
        stage_size=stage_size,
        with_batch_dim=with_batch_dim,
        without_batch_dim_inputs=positions,
        enable_pipeline_infer=enable_pipeline_infer,
        max_batch_size=max_batch_size,
    )
    current().add_model(model)
    return model


def register_method(output_names: str | Sequence[str]) -> Callable[[F], F]:
    """Decorator: the function becomes a method of the servable, its parameters the names of the inputs.

    The function runs once, now, with placeholders; it returns one of them or a sequence, one per output name.
    """
    names = (output_names,) if isinstance(output_names, str) else tuple(output_names)
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
    except ShardserveError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = search_path
    if servable.model is None:
        raise ConfigError(f"{path}: declares no model (distributed.declare_servable)")
    if not servable.methods:
        raise ConfigError(f"{path}: registers no method (register.register_method)")
    return servable
