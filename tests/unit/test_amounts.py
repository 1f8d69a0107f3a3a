from __future__ import annotations

import pytest

from shardserve.amounts import of_bytes, of_flops, of_memory, of_ranks, of_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (20480, "20.5 kB"), (999_999, "1 MB"), (123_456_789, "123 MB"),
     (999_700, "1 MB"), (4 * 10**21, "4000 EB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert of_bytes(count) == text


def test_bytes_that_are_enough() -> None:
    assert [of_bytes(count, up=True) for count in (999, 1000, 10**9, 10**9 + 1, 999_001)] == [
        "999 B", "1 kB", "1 GB", "1.01 GB", "1 MB",
    ]  # fmt: skip


def test_seconds() -> None:
    assert [of_seconds(value) for value in (2.5, 0.01234, 3e-5, 0)] == ["2.5 s", "12.3 ms", "30 us", "0 us"]


def test_flops_and_placements() -> None:
    assert (of_flops(None), of_flops(12), of_flops(2_000_000_000)) == ("unknown", "12", "2 G")
    assert (of_memory(2000, 0), of_memory(2000, 64)) == ("2 kB", "2 kB + 64 B kept")
    assert of_ranks("Replicate()") == "whole on each rank"
    assert of_ranks("Shard(1)") == "in parts, Shard(1)"
    assert of_ranks("Partial(sum)") == "in terms, Partial(sum)"
    assert of_ranks("") == "placement unknown"
