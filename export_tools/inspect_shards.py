"""`shardserve inspect` as a command of its own."""

import sys

from shardserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
