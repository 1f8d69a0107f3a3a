"""The user's own module and function that `shardserve export` takes a model from, and what they raise."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardserve.errors import ExportError, ShardserveError

# What isn't the user's code: Python's own modules, what is installed, and what has no file.
_LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), "<frozen")


def load(source: str) -> Callable[[], Any]:
    """The function that `module:function` names, importable from the current directory too. ExportError says what of
    it isn't there, or what the module raised, and in which line."""
    module_name, _, name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _told(f"can't import '{module_name}'"):
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ExportError(f"'{module_name}' has no function '{name}'")
    return function  # type: ignore[no-any-return]


def call(source: str, function: Callable[[], Any]) -> Any:
    """What the function returns; ExportError says in one line what it raised, and in which line of the user's code."""
    with _told(f"{source} raised"):
        return function()


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except ShardserveError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        name = type(error).__name__
        raise ExportError(f"{what}: {_where(error)}{name}{': ' * bool(text)}{text}") from error


def _where(error: BaseException) -> str:
    """The innermost line of the user's code, as "net.py, line 7: "; nothing if it isn't their code that raised."""
    if isinstance(error, SyntaxError) and error.filename:
        # Its text has the line already.
        return ""
    own = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename != __file__ and not frame.f_code.co_filename.startswith(_LIBRARIES)
    ]
    return f"{own[-1][0]}, line {own[-1][1]}: " if own else ""
