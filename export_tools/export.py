"""`shardserve export` as a command of its own."""

import sys

from shardserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
