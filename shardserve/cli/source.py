"""What SOURCE of `shardserve export` names: a function of the user's, a Hugging Face folder, a `.pt2` file."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from shardserve.cli import userland
from shardserve.cli.codes import WrongUsage
from shardserve.cli.quiet import quiet_torch
from shardserve.errors import ExportError

logger = logging.getLogger(__name__)

OPTIONS = ("kwargs", "dynamic_shapes", "input_names", "output_names", "plan", "subgraphs", "weights")
"""Of the dict that a function may return."""


class Source(NamedTuple):
    """A model, its example inputs, and `options`: further arguments of `export`, and the plan."""

    model: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def read_source(source: str, meta: bool = False) -> Source:
    """ExportError says what of it isn't there or wrong, WrongUsage that it is none of the three.

    `meta`: parameters need no values, and get no memory.
    """
    if source.endswith(".pt2"):
        from shardserve.export.sources.program import load_program

        with quiet_torch():
            program, model, args, kwargs = load_program(source)
        return Source(model, args, {"kwargs": kwargs, "program": program})
    if Path(source).is_dir():
        from shardserve.export.sources.huggingface import load_folder

        folder = load_folder(source, meta)
        options = {"kwargs": folder.kwargs, "dynamic_shapes": folder.dynamic_shapes, "weights": folder.checkpoint}
        return Source(folder.model, (), options)
    module, _, function = source.partition(":")
    if not module or not function:
        raise WrongUsage(f"SOURCE: {source!r} isn't package.module:function, a Hugging Face folder or a .pt2 file")
    if "/" in module or module.startswith(".") or (module.endswith(".py") and Path(module).is_file()):
        named = ".".join(part for part in Path(module.removesuffix(".py")).parts if part.strip("/."))
        raise WrongUsage(
            f"SOURCE: {source!r} names a path, not a module: {named}:{function}, seen from the current directory or "
            "one of PYTHONPATH"
        )
    made = userland.load(source)
    # Importing torch takes seconds: not before there is something to make of it.
    import torch  # noqa: F401

    if meta:
        from shardserve.export.sources import without_storage

        with without_storage():
            return _checked(source, userland.call(source, made))
    if _says(made, "weights") and (lean := _without_storage(source, made)) is not None:
        return lean
    return _checked(source, userland.call(source, made))


def _without_storage(source: str, function: Callable[[], Any]) -> Source | None:
    """What the function returns with its model's parameters left without memory; None if it returns no weights."""
    from shardserve.export.sources import without_storage

    try:
        with without_storage():
            returned = userland.call(source, function)
    except ExportError as error:
        logger.warning("%s; made again with memory for all parameters", error)
        return None
    made = _checked(source, returned)
    return made if made.options.get("weights") is not None else None


def _says(function: Callable[[], Any], word: str) -> bool:
    """Whether the function's own code has the word as a constant. A function that gives options['weights'] does, unless
    it leaves that to another; then its model is made with memory."""
    code = getattr(inspect.unwrap(function), "__code__", None)

    def walk(value: Any) -> bool:
        if isinstance(value, CodeType):
            return any(map(walk, value.co_consts))
        return any(map(walk, value)) if isinstance(value, (tuple, frozenset)) else bool(value == word)

    return code is not None and walk(code)


def _checked(source: str, returned: Any) -> Source:
    from torch.nn import Module

    expected = f"{source} must return (model, args) or (model, args, options)"
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise ExportError(f"{expected}, got {type(returned).__name__}")
    model, args, options = (*returned, {})[:3]
    if not isinstance(model, Module):
        raise ExportError(f"{expected}: model is {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(args, (tuple, list)):
        raise ExportError(f"{expected}: args is {type(args).__name__}, not a tuple of example inputs")
    if not isinstance(options, Mapping):
        raise ExportError(f"{expected}: options is {type(options).__name__}, not a dict")
    for option in options:
        if option not in OPTIONS:
            raise ExportError(f"{source}: unknown option '{option}'; known: {', '.join(OPTIONS)}")
    return Source(model, tuple(args), dict(options))
