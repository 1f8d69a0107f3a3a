"""Exports the transformer, by default for 2 pipeline stages of 2 tensor-parallel ranks, into model/device0 ….

python export_model.py [--tp 8] [--pp 2] [--out DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from net import example

from shardserve.export import Plan, export, verify

NAME = "transformer"
HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Export the transformer example.")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks of a stage (default 2)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages (default 2)")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    flags = parser.parse_args(arguments)
    model, args, options = example()
    report = export(
        model,
        args,
        name=NAME,
        out=flags.out,
        tensor_parallel=flags.tp,
        pipeline_parallel=flags.pp,
        plan=Plan.load(HERE / "plan.json"),
        **options,
    )
    print(report)
    result = verify(model, args, None, flags.out, NAME, atol=1e-4, rtol=1e-4)
    print(f"max abs error: {result.max_abs_error:.3g} ({result.worst})")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
