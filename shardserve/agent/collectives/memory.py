"""The memory that a tensor-parallel group on one host shares; made by the supervisor, which imports no torch."""

from __future__ import annotations

import os

from shardserve.settings import Settings
from shardserve.wire.frames import padded

LINE = 64
# Bytes of the smallest slot: a piece has at least an element of each rank, of which one host has at most hundreds.
LEAST_SLOT = 4096


def slot_size(settings: Settings) -> int:
    """Bytes of one slot; supervisor and agents have the same settings."""
    return padded(max(settings.collective_slot_bytes, LEAST_SLOT))


def memory_size(ranks: int, slot_bytes: int) -> int:
    """Bytes of shared memory that a group needs."""
    return ranks * LINE + ranks * 2 * (LINE + slot_bytes)


def create_memory(ranks: int, slot_bytes: int) -> int:
    """A descriptor of zeroed anonymous memory for one group: it has no name, and is gone with its last holder."""
    fd = os.memfd_create("shardserve-collective", os.MFD_CLOEXEC)
    os.ftruncate(fd, memory_size(ranks, slot_bytes))
    return fd
