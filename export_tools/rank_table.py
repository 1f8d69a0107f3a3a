"""`shardserve rank-table` as a command of its own."""

import sys

from shardserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["rank-table", *sys.argv[1:]]))
