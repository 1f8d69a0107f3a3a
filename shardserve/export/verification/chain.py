"""`verify_chain`: runs subgraphs that share kept buffers one after the other, and compares after each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export.subgraphs import Subgraph, calling
from shardserve.export.verification.compare import Worst, abs_error, close
from shardserve.export.verification.parting import ways_to_cut, where_they_part
from shardserve.export.verification.running import Shards
from shardserve.export.verification.sizes import cases, in_words, inputs_of, nearest
from shardserve.export.verification.unsharded import Unsharded, raised, restoring
from shardserve.export.verification.verify import VerifyResult, uncompared
from shardserve.export.writing.write import part
from shardserve.progress import Progress, quietly
from shardserve.shards.graph import dtype_name


def verify_chain(
    model: nn.Module,
    subgraphs: Mapping[str, Subgraph],
    out: str | Path,
    name: str,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Progress = quietly,
) -> VerifyResult | None:
    """Run what `export_subgraphs` has written to `out` as a method call does: the subgraphs that keep buffers one after
    the other in the order given, the last one twice, each beginning with what the one before has left.

    Every output and, after each step, every kept buffer is compared with the unsharded model's; once with the example
    inputs, then with the sizes of each subgraph's dynamic dims that `verify` takes, dims of one name at one size if
    their ranges allow it. A chain of sizes begins with the buffers as exported, and ends where the model itself raises
    (its cache is full); the model gets its own buffers back. None where fewer than two subgraphs keep buffers. Raises
    ExportError if the model raises with the example inputs.
    """
    links = _links(model, subgraphs, Path(out), name, progress)
    if len(links) < 2:
        return None
    chain = _Chain(model, links, atol, rtol)
    chains = _sizes(links)
    generator = torch.Generator().manual_seed(0)
    for number, sizes in enumerate(chains):
        progress("comparing in order", number, len(chains))
        steps = [_Step(link, link.whole.example) for link in links]
        if number:
            steps = [_Step(link, link.inputs(dims, generator)) for link, dims in zip(links, sizes, strict=True)]
        chain.run([*steps, steps[-1]])
    return chain.result()


@dataclass(frozen=True)
class _Link:
    """A subgraph of the chain."""

    name: str
    subgraph: Subgraph
    shards: Shards
    whole: Unsharded
    cases: Sequence[Mapping[str, int]]

    def inputs(self, dims: Mapping[str, int], generator: torch.Generator) -> Mapping[str, Tensor]:
        return inputs_of(self.shards.signature, self.whole.example, dims, generator)


@dataclass(frozen=True)
class _Step:
    link: _Link
    inputs: Mapping[str, Tensor]


def _links(
    model: nn.Module, subgraphs: Mapping[str, Subgraph], out: Path, name: str, progress: Progress
) -> list[_Link]:
    links: list[_Link] = []
    for which, subgraph in subgraphs.items():
        shards = Shards(out / which, name, progress, beside=links[0].shards if links else None)
        if shards.state:
            whole = Unsharded(model, subgraph.args, subgraph.kwargs, shards.signature, subgraph.method)
            links.append(_Link(which, subgraph, shards, whole, cases(shards.signature, whole.example)))
    return links


def _sizes(links: Sequence[_Link]) -> list[list[Mapping[str, int]]]:
    """Of each chain the dims of each subgraph: the example's first, then each subgraph's in turn, its last ones when it
    has no more; dims of one name as in the subgraphs before.
    """
    found = [[link.cases[0] for link in links]]
    for number in range(1, max(len(link.cases) for link in links)):
        chosen: dict[str, int] = {}
        sizes: list[Mapping[str, int]] = []
        for link in links:
            own = link.cases[min(number, len(link.cases) - 1)]
            dtypes = {name: dtype_name(tensor.dtype) for name, tensor in link.whole.example.items()}
            wanted = {dim: chosen.get(dim, size) for dim, size in own.items()}
            sizes.append(nearest(link.shards.signature, wanted, dtypes) or own)
            chosen |= sizes[-1]
        if sizes not in found:
            found.append(sizes)
    return found


class _Chain:
    """Runs chains of steps, and remembers the largest errors of all of them."""

    def __init__(self, model: nn.Module, links: Sequence[_Link], atol: float, rtol: float) -> None:
        self._model, self._shards = model, [link.shards for link in links]
        self._tolerances = atol, rtol
        # By name and the stage's first rank: subgraphs share them.
        self._kept = {(name, rank): parts for shards in self._shards for name, rank, parts in shards.kept()}
        self._outputs = {
            link.name: [Worst(f"output '{spec.name}' of {link.name}") for spec in link.shards.signature.outputs]
            for link in links
        }
        self._buffers = {link.name: Worst(f"a buffer after {link.name}") for link in links}
        self.sizes: list[Mapping[str, int]] = []
        self.notes: list[str] = []
        self.parting = ""

    def result(self) -> VerifyResult:
        """The errors are of each subgraph's outputs, then of the buffers after each."""
        outputs = [worst for outputs in self._outputs.values() for worst in outputs]
        errors = (*(worst.error() for worst in outputs), *(worst.error() for worst in self._buffers.values()))
        worst = max(errors, key=lambda error: error.max_abs)
        where = f"{worst.name} with {worst.where}"
        parting, sizes = self.parting, tuple(self.sizes)
        without, notes = uncompared({worst.name: worst for worst in outputs}, self._model)
        passed = not parting and not without
        return VerifyResult(
            max_abs_error=worst.max_abs,
            worst=where,
            passed=passed,
            sizes=sizes,
            outputs=errors,
            parting=parting,
            notes=(*self.notes, *notes),
            uncompared=without,
        )

    def run(self, steps: Sequence[_Step]) -> None:
        """One chain, up to the first step that gives something else than the model, or in which the model raises."""
        dims: dict[str, int] = {}
        differs = -1
        off = ""
        with self._as_exported():
            for at, step in enumerate(steps):
                dims |= step.link.shards.bind(step.inputs)
                where = f"{in_words(dims)} in the order {_order(steps[: at + 1])}"
                try:
                    wanted = step.link.whole.run(step.inputs)
                except Exception as error:  # noqa: BLE001 -- the model's own code raises whatever it likes
                    self._raised(where, error)
                    break
                alike = self._compare(step, wanted, where)
                off = self._compare_buffers(step, where)
                if not alike or off:
                    differs = at
                    off = off if alike else ""
                    break
        self.sizes.append(dims)
        if differs >= 0 and not self.parting:
            self.parting = off or self._where_outputs_part(steps[:differs], steps[differs])

    @contextmanager
    def _as_exported(self) -> Iterator[None]:
        for shards in self._shards:
            shards.reset()
        with restoring(self._model, sorted({name for name, _ in self._kept})):
            yield

    def _raised(self, where: str, error: Exception) -> None:
        said = raised(where, error)
        if not self.sizes:
            raise ExportError(f"the subgraphs can't be compared one after the other: {said}") from error
        self.notes.append(said)

    def _compare(self, step: _Step, wanted: Sequence[Tensor], where: str) -> bool:
        """Whether the outputs of the shards' step are the model's."""
        alike = True
        for worst, got, expected in zip(
            self._outputs[step.link.name], step.link.shards.run(step.inputs), wanted, strict=True
        ):
            worst.take(got, expected, where)
            alike = alike and close(got, expected, *self._tolerances)
        return alike

    def _compare_buffers(self, step: _Step, where: str) -> str:
        """A sentence on the first buffer that isn't the model's; none if all are."""
        whole = dict(self._model.named_buffers(remove_duplicate=False))
        said = ""
        for (name, first), parts in self._kept.items():
            for rank, (got, wanted) in enumerate(zip(parts, _nearest_parts(whole[name], parts), strict=True), first):
                self._buffers[step.link.name].take(got, wanted, f"{where}: '{name}' on rank {rank}")
                if not said and not close(got, wanted, *self._tolerances):
                    error = f"off by up to {abs_error(got, wanted):.3g} on rank {rank}"
                    said = f"they part in the buffer '{name}', which {step.link.name} leaves {error}"
        return said

    def _where_outputs_part(self, before: Sequence[_Step], step: _Step) -> str:
        """What `verify` says of a step, begun with what the steps before it leave."""
        link = step.link
        with self._as_exported():
            for earlier in before:
                earlier.link.whole.run(earlier.inputs)
                earlier.link.shards.run(earlier.inputs)
            try:
                with calling(self._model, link.subgraph.method):
                    return f"in {link.name} " + where_they_part(
                        link.shards,
                        self._model,
                        link.whole.args,
                        link.whole.kwargs,
                        link.subgraph.dynamic_shapes,
                        step.inputs,
                        *self._tolerances,
                    )
            except ExportError as error:
                return f"where they part in {link.name} can't be told: {error}"


def _order(steps: Sequence[_Step]) -> str:
    return ", ".join(step.link.name for step in steps)


def _nearest_parts(whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """What the ranks of a stage should have of a buffer. Shards don't say in how many blocks it is cut: of all ways,
    the one that is nearest on all ranks at once.
    """
    nearest_so_far, least = [whole] * len(parts), float("inf")
    for way in ways_to_cut(whole.shape, parts[0].shape, len(parts)):
        wanted = [part(whole, way, len(parts), rank) for rank in range(len(parts))]
        error = max(abs_error(got, expected) for got, expected in zip(parts, wanted, strict=True))
        if error < least:
            nearest_so_far, least = wanted, error
        if not error:
            break
    return nearest_so_far
