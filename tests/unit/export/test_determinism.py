"""The same model gives the same plan, cuts and shards in every process, whatever order hashes give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .conftest import ROOT

IDS = ("export_id", "state_id", "graph_sha256")  # drawn anew, or of a file that has one


def shards(out: Path) -> dict[str, Any]:
    """The plan and each rank's files, without what is drawn anew for each export."""
    found: dict[str, Any] = {"plan": json.loads((out / "plan.json").read_text())}
    for path in sorted((out / "model").glob("device*/*")):
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            found[name] = {key: value for key, value in content.items() if key not in IDS}
        else:
            found[name] = path.read_bytes()
    return found


def test_other_hashes_give_the_same_shards(tmp_path: Path) -> None:
    outs = [tmp_path / seed for seed in ("0", "1")]
    for out in outs:
        out.mkdir()
        command = ["export", "net:example", "--name", "m", "--out", str(out / "model"), "--tp", "2", "--pp", "2"]
        command += ["--plan", "auto", "--save-plan", str(out / "plan.json")]
        subprocess.run(
            [sys.executable, "-m", "shardserve.cli", *command],
            cwd=ROOT / "examples" / "transformer",
            env={**os.environ, "PYTHONHASHSEED": out.name},
            stdout=subprocess.DEVNULL,
            timeout=120,
            check=True,
        )
    first, second = map(shards, outs)
    assert len(first) == 1 + 4 * 3
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
