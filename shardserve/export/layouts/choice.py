"""Which layout: all that a number of ranks allows, which of them fit into the devices, and how long a step would take.

Memory: a rank's parameters and the buffers that it keeps, and the most that a step's tensors take at once, at the
largest size of each dim. Time: the cost model's, at the example's sizes. The first tensor-parallel rank stands for its
group; it has the most to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardserve.amounts import of_bytes, of_seconds
from shardserve.errors import ExportError
from shardserve.export.cost import Sizes, nbytes, parameter_bytes
from shardserve.export.layouts.layout import Layout, Planner
from shardserve.export.sharding.state import fill_value

ALIKE = 1.05
"""Of layouts whose steps take as long as the fastest, times this, the one of the fewest ranks is taken."""


@dataclass(frozen=True)
class Candidate:
    """A layout: bytes of its largest rank, seconds of a step and between two steps. `refused`: why it is none."""

    tensor_parallel: int
    pipeline_parallel: int
    parameter_bytes: int = 0
    activation_bytes: int = 0
    seconds: float = 0.0
    interval: float = 0.0
    refused: str = ""

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def bytes(self) -> int:
        """What a device has to hold."""
        return self.parameter_bytes + self.activation_bytes

    def __str__(self) -> str:
        layout = f"tp {self.tensor_parallel} x pp {self.pipeline_parallel}"
        if not self.bytes:
            return f"{layout}: refused: {self.refused}"
        memory = f"{of_bytes(self.parameter_bytes)} + {of_bytes(self.activation_bytes)} on a rank"
        steps = f"a step in {of_seconds(self.seconds)}"
        if self.pipeline_parallel > 1:
            steps += f", one each {of_seconds(self.interval)}"
        return f"{layout}: {memory}; {steps}" + (f"; refused: {self.refused}" if self.refused else "")


@dataclass(frozen=True)
class Wanted:
    """Tensor-parallel ranks and pipeline stages, None where they are to be chosen: of at most `ranks` ranks, which fit
    into `memory_per_device` bytes.
    """

    tensor_parallel: int | None
    pipeline_parallel: int | None
    ranks: int | None = None
    memory_per_device: int | None = None

    def check(self) -> None:
        """ExportError for what isn't a number of something, or lacks `ranks`."""
        for what, count in vars(self).items():
            if count is None and self.ranks is None and what.endswith("_parallel"):
                raise ExportError(f"{what} None needs ranks, to choose among their layouts")
            if count is not None and count < 1:
                raise ExportError(f"{what} must be at least 1, got {count}")
        if self.memory_per_device is not None and self.ranks is None:
            raise ExportError("memory_per_device needs ranks, to choose among their layouts")


def choose(planner: Planner, wanted: Wanted) -> tuple[int, int, tuple[Candidate, ...]]:
    """Tensor-parallel ranks, pipeline stages, and what they were chosen among, the best first.

    ExportError, with the smallest memory that would do, if none fits.
    """
    if wanted.ranks is None:
        assert wanted.tensor_parallel is not None
        assert wanted.pipeline_parallel is not None
        return wanted.tensor_parallel, wanted.pipeline_parallel, ()
    found = candidates(planner, wanted)
    if not found or found[0].refused:
        raise ExportError(_nothing(found, wanted.ranks, wanted.memory_per_device))
    return found[0].tensor_parallel, found[0].pipeline_parallel, tuple(found)


def candidates(planner: Planner, wanted: Wanted) -> list[Candidate]:
    """Every layout of at most `wanted.ranks` ranks, the best first and the refused last.

    Numbers of ranks and of stages are the powers of two and the divisors of `wanted.ranks`.
    """
    found: list[Candidate] = []
    pairs = list(_pairs(wanted))
    for index, (tp, pp) in enumerate(pairs):
        planner.progress("comparing layouts", index, len(pairs))
        try:
            layouts = planner.lay_out(tp, pp, coordinates=1)
        except ExportError as error:
            found.append(Candidate(tp, pp, refused=str(error)))
            continue
        found.append(_candidate(list(layouts.values()), wanted.memory_per_device))
    return ranked(found)


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """The best first, the refused last."""
    fastest = min((candidate.seconds for candidate in found if not candidate.refused), default=0.0)

    def order(candidate: Candidate) -> tuple[bool, bool, int, float]:
        alike = candidate.seconds <= fastest * ALIKE
        return bool(candidate.refused), not alike, candidate.ranks if alike else 0, candidate.seconds

    return sorted(found, key=order)


def _nothing(found: Sequence[Candidate], ranks: int, memory: int | None) -> str:
    possible = [candidate for candidate in found if candidate.bytes]
    if memory is None or not possible:
        reasons = "; ".join(f"tp {one.tensor_parallel} x pp {one.pipeline_parallel}: {one.refused}" for one in found)
        return f"no layout of at most {ranks} ranks is possible: {reasons or 'tp and pp are too large'}"
    least = min(possible, key=lambda candidate: candidate.bytes)
    return (
        f"no layout of at most {ranks} ranks fits into {of_bytes(memory)} a device: the least that would do is "
        f"{of_bytes(least.bytes, up=True)}, with tp {least.tensor_parallel} x pp {least.pipeline_parallel}"
    )


def _pairs(wanted: Wanted) -> Iterator[tuple[int, int]]:
    ranks = wanted.ranks or 1
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0 or size & (size - 1) == 0]
    for tp in sizes if wanted.tensor_parallel is None else [wanted.tensor_parallel]:
        for pp in sizes if wanted.pipeline_parallel is None else [wanted.pipeline_parallel]:
            if tp * pp <= ranks:
                yield tp, pp


def _candidate(layouts: Sequence[Layout], memory: int | None) -> Candidate:
    """Of all subgraphs: they share parameters, and take their steps in turn."""
    first = layouts[0]
    held = [_held(layouts, stage) for stage in range(first.pipeline_parallel)]
    taken = [layout.activation_bytes(Sizes.largest(layout.traced)) for layout in layouts]
    activations = [max(stages[index][0] for stages in taken) for index in range(first.pipeline_parallel)]
    stage = max(range(len(held)), key=lambda index: held[index] + activations[index])
    needed = held[stage] + activations[stage]
    refused = ""
    if memory is not None and needed > memory:
        refused = f"{f'stage {stage}' if len(held) > 1 else 'it'} takes {of_bytes(needed)}"
    elif first.tensor_parallel > 1 and all(layout.planned.only_replicated for layout in layouts):
        refused = "the plan shards no parameter"
    seconds = sum(layout.latency(Sizes.example(layout.traced)) for layout in layouts)
    interval = sum(layout.interval(Sizes.example(layout.traced)) for layout in layouts)
    return Candidate(
        tensor_parallel=first.tensor_parallel,
        pipeline_parallel=first.pipeline_parallel,
        parameter_bytes=held[stage],
        activation_bytes=activations[stage],
        seconds=seconds,
        interval=interval,
        refused=refused,
    )


def _held(layouts: Sequence[Layout], stage: int) -> int:
    """The bytes of the parameters of a stage's first rank, and of the buffers that it keeps."""
    parameters = [bound for layout in layouts for bound in layout.stages[stage][0].parameters]
    kept = {buffer.bound.tensor: buffer.bound for layout in layouts for buffer in layout.stages[stage][0].state}
    tensors = {name: tensor for layout in layouts for name, tensor in layout.traced.tensors.items()}
    held = parameter_bytes(parameters, tensors)
    for name, bound in kept.items():
        # First values that aren't all the same are kept beside the buffer.
        held += int(nbytes(bound.shape, bound.dtype)) * (2 if fill_value(tensors[name]) is None else 1)
    return held
