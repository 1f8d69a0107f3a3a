"""Collectives of one tensor-parallel group. Nothing is imported here: the server needs `memory`, and has no torch."""
