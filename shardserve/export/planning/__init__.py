"""Which parameters are cut, and how: as the user gives it (`plan`), as a Hugging Face model has it (`tp_plan`), or as
it is found for any traced model (`find`).

To find it, `probe` tries placements by the rules of the operators; `grow` finds what goes together; `choose` takes what
spares the most for its collectives; `reasons` says why the rest stays whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardserve.export.planning.choose import choose, pattern
from shardserve.export.planning.probe import Prober
from shardserve.export.planning.reasons import NOTABLE, replicated
from shardserve.export.sharding.placements import Replicate, Shard
from shardserve.export.tracing.trace import Trace


@dataclass(frozen=True)
class Found:
    """The placements found, by name of a traced tensor, and a line for each group of parameters that stays whole."""

    placements: Mapping[str, Shard]
    replicated: tuple[str, ...]


def find(
    traced: Trace, size: int, fixed: Mapping[str, Replicate | Shard] | None = None, kept: Collection[str] = ()
) -> Found:
    """Placements on `size` ranks of every tensor; those in `fixed` are as they are there, and of `kept` buffers, which
    lie in the end as what is written into them, `replicated` says nothing.

    Deterministic; nothing is computed but shapes. Tied weights have one placement, under all of their names.
    """
    probe = Prober(traced, size)
    choice = choose(probe, {probe.tied[name]: placement for name, placement in (fixed or {}).items()})
    placements = {name: choice.placements[first] for name, first in probe.tied.items() if first in choice.placements}
    return Found(placements, replicated(probe, choice, kept))


def patterns(traced: Trace, placements: Mapping[str, Replicate | Shard], names: Mapping[str, str]) -> dict[str, str]:
    """A plan's "parameters": patterns for stacks of layers where they match nothing that is cut otherwise.

    `names`: every name of a tensor of the model → its name among the traced ones.
    """
    found: dict[str, str] = {}
    for tensor in traced.tensors:
        wanted = placements.get(tensor)
        if not isinstance(wanted, Shard) or any(fnmatchcase(tensor, text) for text in found):
            continue
        for text in (pattern(tensor), pattern(tensor, literal=1), pattern(tensor, literal=2), tensor):
            matched = [first for name, first in names.items() if fnmatchcase(name, text)]
            if text == tensor or (len(matched) > 1 and all(placements.get(first) == wanted for first in matched)):
                found[text] = str(wanted)
                break
    return found


__all__ = ["NOTABLE", "Found", "find", "pattern", "patterns"]
