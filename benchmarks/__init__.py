"""Measurements, each beside a floor or a peer in the same run. `make bench` runs all."""

import os

# gRPC logs each connection that a stopped floor closes.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
