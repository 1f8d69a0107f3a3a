"""A shard, ready to run: its graph file compiled to one Python function over its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from shardserve.errors import ShardError
from shardserve.shards import arguments, expressions, files, operators
from shardserve.shards.collective import Collective
from shardserve.shards.config import CONFIG_FILE, ShardConfig
from shardserve.shards.graph import (
    Device,
    GraphFile,
    Node,
    Parameter,
    Ref,
    Shape,
    Size,
    State,
    decode_argument,
    dtype_name,
    shortened,
    to_dtype,
)
from shardserve.shards.state import StateStore
from shardserve.shards.updates import write_in_place
from shardserve.shards.weights import Weights, WeightsFile, check_digest

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

Forward = Callable[..., Sequence[Tensor]]
"""A graph as a function of the dims, the inputs and the parameters."""


class Program:
    """The shard of one local rank. One thread at a time may call `run` or `drain`."""

    def __init__(
        self,
        config: ShardConfig,
        graph: GraphFile,
        parameters: Sequence[Tensor],
        device: torch.device,
        state: StateStore | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.dims = graph.dims
        self.parameters = list(parameters)
        self.tensor_names = [parameter.tensor for parameter in graph.parameters]
        # Without a store, for its graph alone.
        self._store = state or StateStore()
        # In the order of graph.state; `run` changes them.
        self._state = [state.tensor(buffer.tensor) for buffer in graph.state] if state is not None else []
        self._held = {tensor.untyped_storage().data_ptr() for tensor in self._state}
        self._fixed = self._held | {tensor.untyped_storage().data_ptr() for tensor in self.parameters}
        # What the graph calls for each of its collectives.
        self.issued: dict[Callable[..., Any], Node] = {}
        builder = _Builder(self, graph)
        self._collectives = builder.collectives
        # Of the state, what the graph doesn't write in place: its new value is copied when the step is done.
        self._copied = builder.copied
        self.graph = builder.graph
        self._forward = builder.compile()
        # Asked once a step, with the dims' sizes: what to run instead of the graph itself, if there is something.
        self.compiled: Callable[[tuple[int, ...]], Forward | None] | None = None
        self._collective: Collective | None = None
        self._completed = 0

    @classmethod
    def load(
        cls,
        graph_file: str | Path,
        group_config_file: str | Path | None = None,
        device: str | torch.device = "cpu",
        weights: Weights | None = None,
        state: StateStore | None = None,
    ) -> Program:
        """Read a shard's files; the config defaults to the group_config.json beside the graph. weights: how weights are
        loaded, and what was so far; programs that are given the same share tensors.
        state: the buffers that the rank's programs keep; a store of its own if none is given.

        Raises ShardError, naming the file, when one is missing, altered, of another export or version, when the graph
        calls an operator that isn't allowed or when a weight is missing or has another shape or dtype.
        """
        graph_file = Path(graph_file)
        config_file = Path(group_config_file) if group_config_file is not None else graph_file.with_name(CONFIG_FILE)
        config = ShardConfig.load(config_file)
        if config.graph_file != graph_file.name:
            raise ShardError(f"{config_file} describes '{config.graph_file}', not '{graph_file.name}'")
        weights_file = graph_file.with_name(config.weights_file)
        content = files.read(graph_file, files.GRAPH_LIMIT)
        check_digest(graph_file, hashlib.sha256(content).hexdigest(), config.graph_sha256)
        graph = GraphFile.decode(content, str(graph_file))
        if graph.export_id != config.export_id:
            raise ShardError(f"{graph_file} and {config_file} are of different exports")
        for what, count, specs in (
            ("inputs", len(graph.inputs), config.receives),
            ("outputs", len(graph.outputs), config.sends),
        ):
            if count != len(specs):
                raise ShardError(f"{graph_file} has {count} {what}, {config_file} says {len(specs)}")
        if graph.dims != tuple(config.signature.dims):
            raise ShardError(f"{graph_file} has the dims {graph.dims}, {config_file} {tuple(config.signature.dims)}")
        kept = [(buffer.tensor, buffer.dtype, buffer.shape) for buffer in graph.state]
        declared = [(spec.name, spec.dtype, spec.shape) for spec in config.state]
        if kept != declared:
            raise ShardError(f"{graph_file} keeps {_named(kept)} between steps, {config_file} says {_named(declared)}")
        file = WeightsFile.open(weights_file)
        _check_tensors((*graph.parameters, *(buffer for buffer in graph.state if buffer.fill is None)), file)
        target = torch.device(device)
        tensors = (weights or Weights()).load(file, config.weights_sha256, target)
        parameters = [tensors[parameter.tensor] for parameter in graph.parameters]
        state = state or StateStore()
        try:
            for buffer in graph.state:
                state.add(buffer, config.state_id or config.export_id, tensors, target)
            return cls(config, graph, parameters, target, state)
        except ShardError as error:
            raise ShardError(f"{graph_file}: {error}") from error

    @property
    def collective_count(self) -> int:
        """How many collectives each step issues; the same on all coordinates of the stage."""
        return len(self._collectives)

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, a kept buffer or a view of one: they stay where they are."""
        return tensor.untyped_storage().data_ptr() in self._fixed

    def reset(self) -> None:
        """The buffers that it and the programs of the same store keep are as they were when they were loaded."""
        self._store.reset()

    def begin(self) -> None:
        """A new step, with no collective issued so far. `run` does so too; needed where `run` may not be reached."""
        self._completed = 0

    def run(self, dims: Mapping[str, int], inputs: Sequence[Tensor], collective: Collective) -> list[Tensor]:
        """One step: `inputs`, on this device, in the order of config.receives; the result in that of config.sends. The
        buffers that it keeps are changed; after an exception they are partly changed.

        Raises what the operators raise: an IndexError for an id out of range, out of memory, …; then call `drain`.
        """
        self._collective, self._completed = collective, 0
        sizes = tuple(dims[dim] for dim in self.dims)
        forward = (self.compiled and self.compiled(sizes)) or self._forward
        results = list(forward(*sizes, *inputs, *self.parameters, *self._state))
        return self._keep(results) if self._state else results

    def _keep(self, results: list[Tensor]) -> list[Tensor]:
        """Copies the state's new values, which follow the outputs; gives the outputs."""
        # What is a view of the state would change with it: the outputs are still being sent when the next step runs.
        own = [x.clone() if x.untyped_storage().data_ptr() in self._held else x for x in results]
        count = len(self.config.sends)
        for index, value in zip(self._copied, own[count:], strict=True):
            self._state[index].copy_(value)
        return own[:count]

    @property
    def copied(self) -> tuple[str, ...]:
        """The buffers that each step copies as a whole, since the graph doesn't only write parts of them."""
        return tuple(self.config.state[index].name for index in self._copied)

    def drain(self, dims: Mapping[str, int], collective: Collective) -> list[Tensor]:
        """After `run` raised: take part in the step's remaining collectives with zeros, and give zeros to send.

        What the collective itself raises isn't an error of the step: it propagates, from here as from `run`.
        """
        remaining = zip(self._collectives, self.collective_inputs(dims), strict=True)
        for node, (shape, dtype) in list(remaining)[self._completed :]:
            _issue(collective, node, torch.zeros(shape, dtype=dtype, device=self.device))
            self._completed += 1
        return [
            torch.zeros(self.config.signature.resolve(spec, dims), dtype=to_dtype(spec.dtype), device=self.device)
            for spec in self.config.sends
        ]

    def collective_inputs(self, dims: Mapping[str, int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of what this rank gives to each collective of a step with these dims."""
        return [
            (tuple(expressions.evaluate(size, dims) for size in node.shape or ()), to_dtype(node.dtype))
            for node in self._collectives
        ]

    def _bind(self, node: Node) -> Callable[[Tensor], Tensor]:
        def issue(x: Tensor) -> Tensor:
            assert self._collective is not None
            result = _issue(self._collective, node, x.contiguous())
            self._completed += 1
            return result

        self.issued[issue] = node
        return issue


def _named(state: Sequence[tuple[str, str, Shape]]) -> str:
    return shortened(", ".join(f"{name} {dtype} {list(shape)}" for name, dtype, shape in state)) if state else "nothing"


def _issue(collective: Collective, node: Node, x: Tensor) -> Tensor:
    kind = node.op.partition(".")[2]
    if kind == "all_reduce":
        return collective.all_reduce(x, node.args[1])
    if kind == "all_gather":
        return collective.all_gather(x)
    return collective.reduce_scatter(x, node.args[1])


def _check_tensors(needed: Sequence[Parameter | State], file: WeightsFile) -> None:
    for parameter in needed:
        entry = file.entries.get(parameter.tensor)
        if entry is None:
            raise ShardError(f"{file.path}: tensor '{parameter.tensor}' is missing")
        if entry.shape != parameter.shape or dtype_name(entry.dtype) != parameter.dtype:
            raise ShardError(
                f"{file.path}: tensor '{parameter.tensor}' is {dtype_name(entry.dtype)} {list(entry.shape)}; "
                f"the graph needs {parameter.dtype} {list(parameter.shape)}"
            )


class _Builder:
    """Rebuilds a graph file as an fx.Graph, whose generated forward runs without an interpreter's overhead."""

    def __init__(self, program: Program, graph: GraphFile) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.kinds: dict[str, arguments.Kind] = {}
        self.dims: dict[str, fx.Node] = {}
        self.sizes: dict[str, fx.Node | int] = {}
        self.collectives: list[Node] = []
        for index, dim in enumerate(graph.dims):
            self.dims[dim] = self.graph.placeholder(f"dim{index}")
        for index, name in enumerate(graph.inputs):
            self.define(name, self.graph.placeholder(f"input{index}"), "tensor")
        for index, parameter in enumerate(graph.parameters):
            self.define(parameter.name, self.graph.placeholder(f"parameter{index}"), "tensor")
        for index, buffer in enumerate(graph.state):
            self.define(buffer.name, self.graph.placeholder(f"state{index}"), "tensor")
        for node in graph.nodes:
            try:
                self.define(node.name, *self.call(node))
            except ShardError as error:
                raise ShardError(f"node '{shortened(node.name)}': {error}") from error
        for name in (*graph.outputs, *(buffer.update for buffer in graph.state if buffer.update is not None)):
            if self.kinds.get(name, "tensor") != "tensor":
                raise ShardError(f"the output '{name}' isn't a tensor")
        self.copied = self.finish(graph)

    def finish(self, graph: GraphFile) -> list[int]:
        """Makes the graph's output: what it sends, then the new values of the state that it doesn't write in place,
        whose positions are given."""
        kept = [(index, buffer.update) for index, buffer in enumerate(graph.state) if buffer.update is not None]
        sends = [self.value(name) for name in graph.outputs]
        output = self.graph.output([*sends, *(self.value(update) for _, update in kept)])
        copied: list[int] = []
        written: dict[fx.Node, fx.Node] = {}
        for place, (index, _) in enumerate(kept, len(sends)):
            # From the output each time: what is rewritten stands there in the place of what was.
            results = cast("list[fx.Node]", output.args[0])
            buffer = self.values[graph.state[index].name]
            write = write_in_place(self.graph, buffer, results[place], written)
            if write is None:
                copied.append(index)
            else:
                written[buffer] = write
        results = cast("list[fx.Node]", output.args[0])
        left = [value for (index, _), value in zip(kept, results[len(sends) :], strict=True) if index in copied]
        output.args = ([*results[: len(sends)], *left],)
        return copied

    def compile(self) -> Forward:
        forward: Forward = fx.GraphModule(torch.nn.Module(), self.graph).forward
        return forward

    def define(self, name: str, node: fx.Node, kind: arguments.Kind) -> None:
        if not _IDENTIFIER.match(name):
            raise ShardError(f"'{name}' can't name a node")
        if name in self.values:
            raise ShardError(f"two nodes are named '{name}'")
        self.values[name], self.kinds[name] = node, kind

    def value(self, name: str) -> fx.Node:
        if name not in self.values:
            raise ShardError(f"'{name}' is used and not defined before")
        return self.values[name]

    def call(self, node: Node) -> tuple[fx.Node, arguments.Kind]:
        kind, _, collective = node.op.partition(".")
        if kind == "collective":
            self.check_collective(node, collective)
        given = [decode_argument(value) for value in node.args]
        args = [self.argument(value) for value in given]
        if kind == "collective":
            self.collectives.append(node)
            return self.graph.call_function(self.program._bind(node), (args[0],)), "tensor"
        target = operators.resolve(node.op)
        named = {name: decode_argument(value) for name, value in node.kwargs.items()}
        kwargs = {name: self.argument(value) for name, value in named.items()}
        # fx writes keywords into the source that it generates: only an operator's own may get there.
        gives = arguments.check(node.op, given, named, self.kinds)
        return self.graph.call_function(target, tuple(args), kwargs), gives

    def check_collective(self, node: Node, kind: str) -> None:
        if kind not in operators.COLLECTIVES:
            raise ShardError(f"operator '{node.op}' is not one that a shard may call")
        reductions = node.args[1:]
        gather = kind == "all_gather"
        if (
            not node.args
            or len(reductions) != (0 if gather else 1)
            or not all(isinstance(op, str) and op in operators.REDUCTIONS for op in reductions)
        ):
            raise ShardError(f"{node.op} has the arguments {shortened(node.args)}")
        source = decode_argument(node.args[0])
        if not isinstance(source, Ref) or self.kinds.get(source.name, "tensor") != "tensor":
            raise ShardError(f"{node.op} takes a tensor, not {shortened(node.args[0])}")
        if node.shape is None or node.kwargs:
            raise ShardError(f"{node.op} needs the shape of what it is given, and takes no keywords")
        dtype = to_dtype(node.dtype)
        if not gather and not operators.can_reduce(reductions[0], dtype):
            raise ShardError(f"{node.op} can't form the {reductions[0]} of {node.dtype} tensors")
        ranks = self.program.config.tensor_parallel_size
        if kind == "reduce_scatter" and (not node.shape or (isinstance(node.shape[0], int) and node.shape[0] % ranks)):
            raise ShardError(f"{node.op} of {list(node.shape)}: its first dim can't be divided by {ranks} ranks")
        for size in node.shape:
            if isinstance(size, str):
                self.size(size)
            elif not 0 <= size <= expressions.MAX_INTEGER:
                raise ShardError(f"{node.op} has the size {size}")

    def argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.value(value.name)
        if isinstance(value, Size):
            return self.size(value.text)
        if isinstance(value, Device):
            return self.program.device
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        return value

    def size(self, text: str) -> fx.Node | int:
        if text not in self.sizes:
            try:
                self.sizes[text] = self.tree(expressions.parse(text).tree)
            except expressions.ExpressionError as error:
                raise ShardError(str(error)) from error
        return self.sizes[text]

    def tree(self, tree: expressions.Tree) -> fx.Node | int:
        if isinstance(tree, int):
            return tree
        if isinstance(tree, str):
            if tree not in self.dims:
                raise ShardError(f"'{tree}' isn't one of the dims")
            return self.dims[tree]
        symbol, operands = tree[0], tuple(self.tree(operand) for operand in tree[1:])
        assert isinstance(symbol, str)
        return self.graph.call_function(expressions.FUNCTIONS[symbol], operands)
