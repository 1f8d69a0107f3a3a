"""`python -m benchmarks.zoo [NAME…] [--layout tp2]`: each model in a process of its own, so that time and memory end.

Prints a table, writes results/zoo.json, and with --docs the table of docs/zoo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.report import RESULTS, machine
from benchmarks.zoo.table import summary, table, write

TIMEOUT = 600  # seconds a model, all layouts together


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all without one")
    parser.add_argument("--layout", action="append", metavar="LAYOUT", help="tp2, pp2, tp2pp2, tp4; all without one")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/zoo.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _work(name: str, layouts: list[str]) -> None:
    """One model in this process; its rows as JSON lines."""
    warnings.simplefilter("ignore")
    import torch

    from benchmarks.zoo import make
    from benchmarks.zoo.measure import rows

    torch.set_num_threads(1)
    for row in rows(name, make(name), layouts):
        print(json.dumps(row.to_json()))


def _run(name: str, layouts: list[str]) -> list[dict[str, Any]]:
    """One model in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.zoo", name, "--worker", *(f"--layout={layout}" for layout in layouts)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)
        failure = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["died"])[-1]
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except subprocess.TimeoutExpired:
        failure, found = f"not done after {TIMEOUT} s", []
    if failure is not None:
        failed = {"model": name, "failure": failure, "matches": False, "missed": ["not exported"], "why": []}
        found = [{**failed, "layout": layout} for layout in layouts]
    for row in found:
        print(table([row]).splitlines()[-1], flush=True)
    return found


def main() -> int:
    arguments = _arguments()
    layouts = arguments.layout or ["tp2", "pp2", "tp2pp2", "tp4"]
    if arguments.worker:
        _work(arguments.names[0], layouts)
        return 0
    from benchmarks.zoo import MODELS

    names = arguments.names or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        print(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    print("\n".join(table([]).splitlines()))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = [row for found in pool.map(lambda name: _run(name, layouts), names) for row in found]
    print(summary(rows))
    RESULTS.mkdir(exist_ok=True)
    content = {"name": "zoo", "machine": machine(), "rows": rows}
    (RESULTS / "zoo.json").write_text(json.dumps(content, indent=2) + "\n")
    if arguments.docs:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
