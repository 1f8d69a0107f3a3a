"""Cuts a model into shards: `shardserve export` as a command of its own.

python export_tools/export.py net:example --name transformer --out model --tp 2 --pp 2 --plan plan.json --verify
"""

from __future__ import annotations

import argparse
import sys

from shardserve.cli.export import EXAMPLE, add_arguments, run


def main() -> int:
    """Parse the command line and export; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
