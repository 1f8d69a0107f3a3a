"""Exported programs: `.pt2` files, as torch.export.save writes them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges

from shardserve.errors import ExportError
from shardserve.export.refusals import in_module

_PICKLE = "data.pkl"
"""What torch.save and torch.jit.save write, and torch.export.save never does."""


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
    with zipfile.ZipFile(path) as archive:
        if any(name.rpartition("/")[2] == _PICKLE for name in archive.namelist()):
            raise ExportError(
                f"{path}: not a file of torch.export.save, but of torch.save or torch.jit.save: save the program that "
                "torch.export.export makes of the module, or write a function that gives the module"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own pickled tree specs
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.export.unflatten(program)
    return program, module, tuple(args), dict(kwargs)


def as_traced(program: ExportedProgram) -> None:
    """What torch.export.load makes of the sizes, put as they were when the program was traced; a program that was just
    exported stays as it is. ExportError for one that was exported in training mode.

    Saved are the ranges that were declared. While torch traces, a size that is declared from 1 on counts as one from 2
    on, and an expression over sizes (n - 1) has no range of its own: without that, decomposing the graph assumes
    sizes that nobody asked for, or fails. Sizes of such expressions keep their range: torch has found it, not declared.
    """
    _refuse_training(program.graph)
    environments = {
        id(size.node.shape_env): size.node.shape_env
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }
    for environment in environments.values():
        ranges = environment.var_to_range
        expressions = [size for size in ranges if not isinstance(size, sympy.Symbol)]
        related = {symbol for size in expressions for symbol in size.free_symbols}
        for size in expressions:
            del ranges[size]
        for symbol, interval in ranges.items():
            plain = symbol not in related and symbol_is_type(symbol, SymT.SIZE)
            if plain and interval.lower < 2 <= interval.upper:
                ranges[symbol] = ValueRanges(2, interval.upper)


def _refuse_training(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
        given |= node.kwargs
        name = node.target._opname
        drops = name.endswith("dropout") and (given.get("train") or given.get("training")) and given.get("p")
        # Without running statistics, a batch's own are those of evaluation, too.
        updates = name == "batch_norm" and given.get("training") and given.get("running_mean") is not None
        if drops or updates:
            raise ExportError(
                f"the program was exported in training mode ({node.target}{in_module(node)}): "
                "export it again after model.eval()"
            )
