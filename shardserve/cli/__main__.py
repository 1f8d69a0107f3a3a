"""`python -m shardserve.cli`: the same as `shardserve`."""

import sys

from shardserve.cli import main

sys.exit(main())
