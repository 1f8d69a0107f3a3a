"""Exports the example's model for 8 ranks into ../model/device0 … device7.

python export_model.py
"""

import argparse
import sys
from pathlib import Path

import torch
from net import Net

from shardserve.export import Plan, export, verify

NAME = "matmul"
RANKS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Export the matmul example for 8 ranks.")
    parser.add_argument("--random", type=int, metavar="SEED", help="random weights instead of 0.5 everywhere")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "model")
    options = parser.parse_args()
    model, args = Net(options.random), (torch.ones(128, 96),)
    # Each rank has 12 of the 96 rows of the weight and takes its 12 columns of x; one all-reduce adds the terms up.
    plan = Plan({"w": "Shard(0)"})
    report = export(
        model, args, name=NAME, out=options.out, tensor_parallel=RANKS, plan=plan, input_names=["x"], output_names=["y"]
    )
    print(report)
    result = verify(model, args, None, options.out, NAME, atol=1e-4, rtol=1e-5)
    print(f"max abs error: {result.max_abs_error:.3g}")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
