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
    """floor: of the same run, in the same unit, or None where there is nothing to compare with."""

    name: str
    unit: str
    floor: float | None
    ours: float

    @property
    def ratio(self) -> float | None:
        return self.ours / self.floor if self.floor else None


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
    print(f"{'':{width}}  {'floor':>9}  {'ours':>9}  ratio")
    for row in rows:
        floor = f"{row.floor:9.3f}" if row.floor is not None else f"{'':9}"
        ratio = f"{row.ratio:5.2f}" if row.ratio is not None else ""
        print(f"{row.name:{width}}  {floor}  {row.ours:9.3f}  {ratio:5} {row.unit}")
    RESULTS.mkdir(exist_ok=True)
    content = {"name": name, "machine": on, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
