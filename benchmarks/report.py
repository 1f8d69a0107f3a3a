"""The table that each benchmark prints, and the JSON that it writes to results/."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class Row:
    """floor: of the same run, in the same unit, or None where there is nothing to compare with. goal: what the ratio to
    the floor has to be, at most or at least, or what `ours` has to be where there is no floor."""

    name: str
    unit: str
    floor: float | None
    ours: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        value = self.ours if self.ratio is None else self.ratio
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None

    @property
    def goal(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""


def machine() -> dict[str, object]:
    """What the figures depend on."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def report(name: str, rows: list[Row], on: dict[str, object]) -> None:
    """Prints the rows and writes results/NAME.json."""
    width = max(len(row.name) for row in rows)
    print(f"{name} on {on['cores']} cores of {on['processor']}, load {on['load']:.1f}, torch {on['torch']}")
    print(f"{'':{width}}  {'floor':>9}  {'ours':>9}  {'ratio':>6}  goal")
    for row in rows:
        floor = f"{row.floor:9.3f}" if row.floor is not None else f"{'':9}"
        ratio = f"{row.ratio:6.3f}" if row.ratio is not None else f"{'':6}"
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.name:{width}}  {floor}  {row.ours:9.3f}  {ratio}  {row.goal:8} {verdict:6} {row.unit}")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "name": name,
        "machine": on,
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
