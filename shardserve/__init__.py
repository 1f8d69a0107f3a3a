"""Serve any PyTorch model cut into tensor- and pipeline-parallel shards (see docs/architecture.md)."""

__version__ = "0.1.0"
