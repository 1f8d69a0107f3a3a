"""The plan: which parameters are cut, along which dim, and where the pipeline stages begin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from shardserve.errors import ExportError
from shardserve.export.planning import tp_plan
from shardserve.export.sharding.placements import Replicate, Shard, parse_placement


@dataclass(frozen=True)
class Plan:
    """`parameters`: name pattern (as `blocks.*.mlp.up.weight`) → "Shard(dim)" or "Replicate()"; parameters that no
    pattern matches are replicated, or, if `auto`, cut as the exporter finds best. `cuts`: the module that begins each
    later pipeline stage.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)
    cuts: Sequence[str] = ()
    auto: bool = False

    def __post_init__(self) -> None:
        for pattern, text in self.parameters.items():
            parse_placement(text, f"plan: '{pattern}'")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan's JSON file; ExportError names the file and what is wrong."""
        try:
            content = json.loads(Path(path).read_text(), object_pairs_hook=_unique)
        except OSError as error:
            raise ExportError(f"plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise ExportError(f"plan {path}: {error}") from error
        try:
            return cls.from_dict(content)
        except ExportError as error:
            raise ExportError(f"plan {path}: {error}") from error

    @classmethod
    def from_tp_plan(cls, model: nn.Module) -> Plan:
        """The plan that a Hugging Face model brings with it; ExportError names the pattern of an unknown style."""
        return cls(tp_plan.parameters(model))

    @classmethod
    def from_dict(cls, content: Any) -> Plan:
        """The plan of a decoded JSON object."""
        if not isinstance(content, dict) or content.keys() - {"parameters", "cuts", "auto"}:
            raise ExportError('a plan is an object with "parameters", "cuts" and "auto"')
        parameters, cuts = content.get("parameters", {}), content.get("cuts", [])
        if not isinstance(parameters, dict) or not all(isinstance(text, str) for text in parameters.values()):
            raise ExportError('"parameters" must be an object of strings')
        if not isinstance(cuts, list) or not all(isinstance(module, str) for module in cuts):
            raise ExportError('"cuts" must be a list of module names')
        if not isinstance(content.get("auto", False), bool):
            raise ExportError('"auto" must be true or false')
        return cls(parameters, tuple(cuts), content.get("auto", False))

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file that `load` reads; ExportError if that can't be done."""
        content: dict[str, Any] = {"parameters": dict(self.parameters)}
        content |= {"cuts": list(self.cuts)} if self.cuts else {}
        content |= {"auto": True} if self.auto else {}
        try:
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ExportError(f"plan {path}: {error.strerror}") from error

    def placements(self, shapes: Mapping[str, Sequence[int]], size: int) -> dict[str, Replicate | Shard]:
        """The placements on `size` ranks of the parameters that a pattern matches.

        Raises ExportError for a pattern that matches nothing, patterns that disagree on a parameter, a dim that the
        parameter doesn't have or that `size` doesn't divide.
        """
        placements: dict[str, Replicate | Shard] = {}
        decided: dict[str, str] = {}
        for pattern, text in self.parameters.items():
            placement = parse_placement(text, f"plan: '{pattern}'")
            matched = [name for name in shapes if fnmatchcase(name, pattern)]
            if not matched:
                raise ExportError(f"plan: '{pattern}' matches no parameter of the model")
            for name in matched:
                if placements.get(name, placement) != placement:
                    raise ExportError(
                        f"plan: '{name}' is {placements[name]} by '{decided[name]}' and {placement} by '{pattern}'"
                    )
                placements[name], decided[name] = placement, pattern
                if isinstance(placement, Shard):
                    _check_divisible(name, placement, shapes[name], size)
        return placements


def _check_divisible(name: str, placement: Shard, shape: Sequence[int], size: int) -> None:
    if placement.dim >= len(shape):
        raise ExportError(f"plan: parameter '{name}' of shape {list(shape)} has no dim {placement.dim}")
    if not placement.divides(shape[placement.dim], size):
        count = f"of sizes {placement.blocks}" if isinstance(placement.blocks, tuple) else ""
        blocks = f"blocks {count}" if count else f"{placement.blocks} blocks"
        parts = f"{size} ranks" if placement.blocks == 1 else f"{blocks} on {size} ranks"
        raise ExportError(
            f"plan: dim {placement.dim} of parameter '{name}' has size {shape[placement.dim]}, "
            f"which doesn't divide into {parts}"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"'{key}' is given twice")
        content[key] = value
    return content
