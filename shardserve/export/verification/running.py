"""All shards of an export, read back from disk and run in this process: for `verify` and for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from shardserve.errors import ExportError, ShardError
from shardserve.export.verification import sizes
from shardserve.export.verification.threads import ThreadCollective, ThreadGroup
from shardserve.progress import Progress, quietly
from shardserve.shards.config import CONFIG_FILE, GRAPH_SUFFIX, ShardConfig, Signature
from shardserve.shards.graph import dtype_name
from shardserve.shards.program import Program
from shardserve.shards.state import StateStore
from shardserve.shards.weights import Weights


class Shards:
    """All local ranks of one export, loaded from `out`."""

    def __init__(self, out: str | Path, name: str, progress: Progress = quietly, beside: Shards | None = None) -> None:
        """beside: another subgraph of the same ranks, which they share their buffers with."""
        folder = Path(out)
        first = ShardConfig.load(folder / "device0" / CONFIG_FILE)
        files = [folder / f"device{rank}" / f"{name}{GRAPH_SUFFIX}" for rank in range(first.rank_size)]
        programs: list[Program] = []
        self.stores: list[StateStore] = []
        for rank, file in enumerate(files):
            progress("reading shards", rank, len(files))
            state = beside.stores[rank] if beside else StateStore()
            self.stores.append(state)
            programs.append(Program.load(file, weights=Weights(mapped=True), state=state))
        for rank, program in enumerate(programs):
            if program.config.export_id != first.export_id or program.config.rank != rank:
                raise ShardError(f"{files[rank]} is not rank {rank} of the same export as device0")
        size = first.tensor_parallel_size
        self.stages = [programs[start : start + size] for start in range(0, len(programs), size)]
        self.signature: Signature = first.signature

    @property
    def state(self) -> list[str]:
        """The buffers that a rank keeps between steps."""
        return sorted({spec.name for stage in self.stages for rank in stage for spec in rank.config.state})

    def kept(self) -> Iterator[tuple[str, int, list[Tensor]]]:
        """Those buffers, stage by stage: the name, the stage's first rank, and what each of its ranks has."""
        for stage in self.stages:
            config = stage[0].config
            stores = self.stores[config.rank : config.rank + len(stage)]
            for spec in config.state:
                yield spec.name, config.rank, [store.tensor(spec.name) for store in stores]

    def reset(self) -> None:
        """Those buffers are as exported again."""
        for store in self.stores:
            store.reset()

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of the last stage's first rank; InvalidInput as the server would say it."""
        *_, last = self.run_stages(inputs)
        return last[0]

    def run_stages(self, inputs: Mapping[str, Tensor]) -> Iterator[list[list[Tensor]]]:
        """What each rank of each stage sends, stage by stage."""
        dims = self.bind(inputs)
        carried = [[inputs[spec.name] for spec in self.signature.inputs] for _ in self.stages[0]]
        for stage in self.stages:
            carried = ThreadGroup(len(stage)).run(partial(_step, stage, dims, carried))
            yield carried

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The sizes of the dims that these inputs have; InvalidInput as the server would say it."""
        return sizes.bind(self.signature, inputs)


def _step(
    stage: Sequence[Program], dims: Mapping[str, int], inputs: Sequence[Sequence[Tensor]], rank: ThreadCollective
) -> list[Tensor]:
    """One rank's step; what it gives to others must have the shapes and dtypes that its files say."""
    program = stage[rank.rank]
    tensors = program.run(dims, inputs[rank.rank], rank)
    if rank.given != program.collective_inputs(dims):
        raise ExportError(f"rank {program.config.rank} gives its group {rank.given}, not what its graph file says")
    _check_sent(program, tensors, dims)
    return tensors


def _check_sent(program: Program, tensors: Sequence[Tensor], dims: Mapping[str, int]) -> None:
    config = program.config
    for spec, tensor in zip(config.sends, tensors, strict=True):
        expected = config.signature.resolve(spec, dims)
        if tuple(tensor.shape) != expected or dtype_name(tensor.dtype) != spec.dtype:
            raise ExportError(
                f"rank {config.rank}: '{spec.name}' is {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
                f"its config says {spec.dtype} {list(expected)}"
            )
