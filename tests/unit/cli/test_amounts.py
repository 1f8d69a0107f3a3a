from __future__ import annotations

import pytest

from shardserve.cli.amounts import of_bytes, of_flops, of_memory, of_ranks


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (20480, "20.5 kB"), (999_999, "1 MB"), (123_456_789, "123 MB"),
     (999_700, "1 MB"), (4 * 10**21, "4000 EB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert of_bytes(count) == text


def test_flops_and_placements() -> None:
    assert (of_flops(None), of_flops(12), of_flops(2_000_000_000)) == ("unknown", "12", "2 G")
    assert (of_memory(2000, 0), of_memory(2000, 64)) == ("2 kB", "2 kB + 64 B kept")
    assert of_ranks("Replicate()") == "whole on each rank"
    assert of_ranks("Shard(1)") == "in parts, Shard(1)"
    assert of_ranks("Partial(sum)") == "in terms, Partial(sum)"
    assert of_ranks("") == "placement unknown"
