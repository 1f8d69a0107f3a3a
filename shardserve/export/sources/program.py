"""Exported programs: `.pt2` files, as torch.export.save writes them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from shardserve.errors import ExportError


def load_program(path: str | Path) -> tuple[ExportedProgram, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The program in a file, the module that it makes, and the example inputs, positional and by keyword, that it was
    exported with.

    Loading runs what is in the file, as importing a module does: only for files that the user made or trusts. Raises
    ExportError where it can't be loaded or has no example inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path}: not a file of torch.export.save")
    try:
        program = torch.export.load(path)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        EOFError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        text = " ".join(str(error).split())
        raise ExportError(f"{path}: torch.export.load can't read it: {type(error).__name__}: {text}") from error
    if program.example_inputs is None:
        raise ExportError(f"{path}: was saved without its example inputs; export it with torch.export.export again")
    args, kwargs = program.example_inputs
    return program, torch.export.unflatten(program), tuple(args), dict(kwargs)
