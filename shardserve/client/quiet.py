"""grpc, imported without the log of its C half, which writes a line to stderr for each TLS handshake that fails:
clients print nothing. Unless the user has set its level, or has imported it before."""

from __future__ import annotations

import os

LEVEL = "GRPC_VERBOSITY"

if LEVEL not in os.environ:
    os.environ[LEVEL] = "NONE"
    try:
        import grpc  # noqa: F401 -- it reads the level now, and not again
    finally:
        del os.environ[LEVEL]
