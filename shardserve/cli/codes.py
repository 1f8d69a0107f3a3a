"""Exit codes: 0 done, 1 failed, 2 wrong usage (the command line itself is wrong, whatever the files say), and these."""

# What shells give for a program that SIGINT has ended: 128 + its number.
INTERRUPTED = 130


class WrongUsage(Exception):
    """What argparse can't tell by itself: options that don't go together, or one that is missing. Exit code 2."""
