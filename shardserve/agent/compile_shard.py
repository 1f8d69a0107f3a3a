"""`python -m shardserve.agent.compile_shard GRAPH CONFIG FOLDER THREADS ONES PARENT`: compiles a shard's regions.

A process of its own, which runs while the cores have nothing else to do: compiling holds Python's lock for seconds, in
which an agent's steps would wait. THREADS: of the operators. ONES: the dims that are 1, a comma between; the others are
at least 2. Writes a shared library for each region and then the manifest into FOLDER. Ends with the process PARENT.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.printers import PythonPrinter

from shardserve.agent.compilation import (
    OPTIONS,
    Manifest,
    Order,
    library_name,
    load_library,
    manifest_name,
    region_name,
)
from shardserve.shards import expressions, operators
from shardserve.shards.config import DimRange, ShardConfig
from shardserve.shards.graph import GraphFile, to_dtype
from shardserve.shards.program import Program
from shardserve.shards.regions import carrier, find_regions, region_graph

# Above a dim's least size: what the compiler takes for typical.
TYPICAL = 16


class _Dims:
    """The dims as the compiler's symbols, which gather what the compiled code takes for granted of them."""

    def __init__(self, names: Sequence[str], ranges: Mapping[str, DimRange], ones: frozenset[str]) -> None:
        self._env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._env)
        self._names: dict[Any, str] = {}
        self.carriers = [
            self.mode.from_tensor(carrier(1), static_shapes=True) if name in ones else self._symbol(name, ranges[name])
            for name in names
        ]
        self.sizes: dict[str, Any] = {name: c.shape[0] for name, c in zip(names, self.carriers, strict=True)}

    def _symbol(self, name: str, limits: DimRange) -> Tensor:
        least = max(limits.min, 2)
        typical = least + TYPICAL + len(self._names)
        typical = typical if limits.max is None else min(typical, limits.max)
        context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
        made: Tensor = self.mode.from_tensor(carrier(typical), symbolic_context=context)
        symbol: Any = made.shape[0]
        self._env.constrain_symbol_range(symbol.node.expr, least, limits.max or sys.maxsize)
        self._names[symbol.node.expr] = name
        return made

    def evaluate(self, size: int | str) -> Any:
        """As expressions.evaluate, which gives plain integers only."""
        return size if isinstance(size, int) else self._tree(expressions.parse(size).tree)

    def _tree(self, tree: expressions.Tree) -> Any:
        if isinstance(tree, int):
            return tree
        if isinstance(tree, str):
            return self.sizes[tree]
        functions: dict[str, Any] = {**expressions.FUNCTIONS, "min": torch.sym_min, "max": torch.sym_max}
        return functions[str(tree[0])](*(self._tree(operand) for operand in tree[1:]))

    def conditions(self) -> tuple[str, ...]:
        """Under which the code may be used; NotImplementedError if one isn't of the dims alone."""
        if self._env.deferred_runtime_asserts:
            raise NotImplementedError(f"sizes that follow from data: {self._env.deferred_runtime_asserts}")
        return tuple(self._condition(guard.expr) for guard in self._env.guards)

    def _condition(self, guard: Any) -> str:
        symbol = type(next(iter(self._names)))
        printer: Any = PythonPrinter()
        text: str = printer.doprint(guard.xreplace({s: symbol(name) for s, name in self._names.items()}))
        try:
            condition = expressions.parse_condition(text)
        except expressions.ExpressionError as error:
            raise NotImplementedError(f"the condition {text}: {error}") from error
        if unknown := condition.names - set(self.sizes):
            raise NotImplementedError(f"the condition {text} depends on {', '.join(sorted(unknown))}")
        return text


class _Shapes(fx.Interpreter):
    """Runs a Program's graph on tensors without data, and keeps each node's result as meta["val"]."""

    def __init__(self, program: Program) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), program.graph))
        self._issued = program.issued
        self._ranks = program.config.tensor_parallel_size

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = result = super().run_node(n)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operators.embedding:
            weight, ids = args[:2]
            return weight.new_empty((*ids.shape, weight.shape[1]))
        if target not in self._issued:
            return super().call_function(target, args, kwargs)
        (x,) = args
        rows = list(x.shape[:1])
        if self._issued[target].op == "collective.all_gather":
            rows = [rows[0] * self._ranks]
        elif self._issued[target].op == "collective.reduce_scatter":
            rows = [rows[0] // self._ranks]
        return x.new_empty((*rows, *x.shape[1:]))


def compile_shard(graph_file: Path, config_file: Path, folder: Path, ones: frozenset[str]) -> Manifest:
    """The libraries, in `folder`, of the graph's regions, in order."""
    config, file = ShardConfig.load(config_file), GraphFile.load(graph_file)
    program = Program(config, file, [], torch.device("cpu"))
    dims = _Dims(file.dims, config.signature.dims, ones)
    with dims.mode:
        given = [
            torch.empty([dims.evaluate(size) for size in spec.shape], dtype=to_dtype(spec.dtype))
            for spec in config.receives
        ]
        parameters = [torch.empty(p.shape, dtype=to_dtype(p.dtype)) for p in file.parameters]
        state = [torch.empty(buffer.shape, dtype=to_dtype(buffer.dtype)) for buffer in file.state]
        _Shapes(program).run(*dims.sizes.values(), *given, *parameters, *state)
    libraries, orders, regions = [], [], []
    names: dict[str, str] = {}
    for region in find_regions(program.graph, len(file.dims)):
        module = fx.GraphModule(torch.nn.Module(), region_graph(program.graph, len(file.dims), region))
        taken = [None if _is_contiguous(node, program) else _order(node.meta["val"]) for node in region.inputs]
        with dims.mode:
            inputs = [
                node.meta["val"] if order is None else _dense(node.meta["val"], order)
                for node, order in zip(region.inputs, taken, strict=True)
            ]
        values = [*dims.carriers, *inputs]
        for node, value in zip(module.graph.nodes, values, strict=False):
            node.meta["val"] = value
        layouts = [(value.dtype, value.shape, value.stride()) for value in values]
        code = hashlib.sha256(f"{module.code}{layouts}{sorted(ones)}".encode()).hexdigest()
        if code not in names:
            made = folder / f"{code[:32]}.so"
            options = {"aot_inductor.output_path": os.fspath(made), **OPTIONS}
            torch._inductor.aot_compile(module, tuple(values), options=options)
            _try_out(made, module, values)
            names[code] = library_name(made)
            made.rename(folder / names[code])
        libraries.append(names[code])
        orders.append(tuple(taken))
        regions.append(region_name(module))
    return Manifest(tuple(libraries), dims.conditions(), tuple(orders), tuple(regions))


def _try_out(library: Path, module: fx.GraphModule, values: Sequence[Tensor]) -> None:
    """NotImplementedError if what the library gives has another dtype or shape. What ends the process at its first run
    ends this one, not an agent at its every start."""
    given = [_zeros(value) for value in values]
    for made, right in zip(load_library(library)(list(given)), module(*given), strict=True):
        if (made.dtype, made.shape) != (right.dtype, right.shape):
            raise NotImplementedError(
                f"compiled, it gives {made.dtype}{list(made.shape)} instead of {right.dtype}{list(right.shape)}: "
                f"{' '.join(module.code.split())}"
            )


def _zeros(value: Tensor) -> Tensor:
    """Of the size that the compiler took for typical, and as dense as `value`. Takes no memory until it is written."""
    order = _order(value)
    made = torch.zeros([_typical(value.shape[dim]) for dim in order], dtype=value.dtype)
    return made.permute([order.index(dim) for dim in range(len(order))])


def _typical(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _is_contiguous(node: fx.Node, program: Program) -> bool:
    """Whether it is one in every step, too: what the program is given, and what collectives give."""
    return node.op == "placeholder" or node.target in program.issued


def _order(value: Tensor) -> Order:
    # By the typical sizes: to compare the strides themselves would make a condition of it.
    strides = [_typical(stride) for stride in value.stride()]
    return tuple(sorted(range(value.dim()), key=strides.__getitem__, reverse=True))


def _dense(value: Tensor, order: Order) -> Tensor:
    """As it, with its dims in this order in memory, without gaps."""
    made = value.new_empty([value.shape[dim] for dim in order])
    return made.permute([order.index(dim) for dim in range(len(order))])


def _end_with(parent: int) -> None:
    """And with it the C++ compiler, which is in this process's group."""
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([descriptor], [], [])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def write(graph_file: Path, config_file: Path, folder: Path, ones: frozenset[str]) -> None:
    """Compiles a variant, and says so last and at once: what a manifest names is complete."""
    manifest = compile_shard(graph_file, config_file, folder, ones)
    target = folder / manifest_name(ones)
    scratch = target.with_suffix(".new")
    scratch.write_bytes(manifest.encode())
    scratch.replace(target)


def main(arguments: Sequence[str]) -> None:
    graph_file, config_file, folder, threads, ones, parent = arguments
    _end_with(int(parent))
    # Only cores that nobody else wants; the C++ compiler inherits it.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(int(threads))
    write(Path(graph_file), Path(config_file), Path(folder), frozenset(filter(None, ones.split(","))))


if __name__ == "__main__":
    main(sys.argv[1:])
