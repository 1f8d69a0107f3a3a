"""`make bench-export-memory`: anonymous memory of exports, of a checkpoint and of a live module, and of loading shards.

The checkpoint is a Llama of random weights in bfloat16, in the Hugging Face layout. Processes are children of this one,
which looks at their /proc/PID/smaps_rollup while they run: mapped files are no memory of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import Row, machine, report
from shardserve.export.weights_file import write_weights
from shardserve.shards.config import CONFIG_FILE, ShardConfig

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
LAYERS = 8
FILE_BYTES = 1 << 30
LOOK_SECONDS = 0.02
BASE = 600e6
"""What an export may need beside weights: Python, torch, transformers, the graph."""
MB = 1e6


class Run(NamedTuple):
    """Of a child: most bytes of anonymous memory, seconds, what it printed."""

    peak: float
    seconds: float
    output: str


def run(*words: str, **environment: str) -> Run:
    """`python WORDS`, watched."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(LOOK_SECONDS)
    assert child.stdout is not None
    output = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)}: {output}")
    return Run(peak, time.perf_counter() - started, output)


def anonymous(pid: int) -> float:
    """Bytes of a process's anonymous memory now; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024.0 if found else 0.0


def checkpoint(folder: Path) -> int:
    """Writes the folder, file by file; its bytes."""
    folder.mkdir()
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_value, HIDDEN),
        "self_attn.v_proj": (key_value, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled > FILE_BYTES:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += 2 * torch.Size(shape).numel()
    noise = torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(files):
        name = f"model-{number}.safetensors"
        layout = {tensor: (torch.bfloat16, shape) for tensor, shape in part.items()}
        total += write_weights(folder / name, layout, lambda tensor: _part(noise, shapes[tensor]))[1]
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _part(noise: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return noise[: torch.Size(shape).numel()].view(shape)


def shards(out: Path) -> Mapping[int, ShardConfig]:
    """The configs of an export, by the bytes of their weights."""
    configs = [ShardConfig.load(file) for file in out.glob(f"device*/{CONFIG_FILE}")]
    return {config.parameter_bytes: config for config in configs}


def measure(scratch: Path, live_bytes: int) -> list[Row]:
    size = checkpoint(scratch / "folder")
    layout = ("--tp", "2", "--pp", "2")
    command = ("-m", "shardserve.cli", "export")
    words = (*command, str(scratch / "folder"), "--name", "m", "--out", str(scratch / "out"), *layout)
    folder = run(*words, "--plan", "tp_plan")
    sizes = shards(scratch / "out")
    largest = max(sizes)
    rows = [_row(f"export of a folder of {size / 1e9:.2f} GB, tp 2 x pp 2", folder, 1.3 * largest + BASE)]
    live = run(
        *(*command, "benchmarks.memory_models:live", "--name", "m", "--out", str(scratch / "live"), *layout),
        LIVE_BYTES=str(live_bytes),
    )
    bound = live_bytes + max(shards(scratch / "live")) + BASE
    rows.append(_row(f"export of a live module of {live_bytes / 1e9:.2f} GB, tp 2 x pp 2", live, bound))
    graph = scratch / "out" / f"device{sizes[largest].rank}" / sizes[largest].graph_file
    load = "import sys, shardserve.agent.agent as agent"
    empty = run("-c", f"{load}; import time; time.sleep(1)")
    for mapped in (False, True):
        loaded = run(
            "-c", f"{load}; agent.Program.load(sys.argv[1], weights=agent.Weights(mapped={mapped}))", str(graph)
        )
        how = "mapped" if mapped else "read"
        rows.append(_row(f"an agent that loads {largest / 1e9:.2f} GB, {how}", loaded, 1.05 * largest + empty.peak))
    rows.append(Row("an empty agent", "MB", None, empty.peak / MB))
    return rows


def _row(what: str, made: Run, bound: float) -> Row:
    return Row(f"{what}, in {made.seconds:.0f} s; floor: the bound", "MB", bound / MB, made.peak / MB, at_most=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=None, help="where 10 GB are written (default: the system's)")
    parser.add_argument("--live-bytes", type=int, default=1 << 30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        report("export_memory", measure(Path(scratch), args.live_bytes), machine())


if __name__ == "__main__":
    main()
