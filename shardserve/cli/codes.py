"""Exit codes beyond 0 done, 1 failed and 2 wrong usage."""

# What shells give for a program that SIGINT has ended: 128 + its number.
INTERRUPTED = 130
