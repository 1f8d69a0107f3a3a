"""What a rank sends of a tensor, from the placement that its shard has in writing."""

from __future__ import annotations

import pytest
import torch

from shardserve.export.writing.origins import rank_part


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("Replicate()", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("Shard(0)", [4, 5, 6, 7]),
        ("Shard(0, blocks=2)", [2, 3, 6, 7]),
        ("Shard(0, blocks=(6, 2))", [3, 4, 5, 7]),
        ("Shard(0, blocks=n)", [2, 3, 6, 7]),
        ("Shard(0, blocks=(n + 2) // 2)", [2, 3, 6, 7]),
        ("Shard(0, blocks=(6, 3))", None),
        ("Shard(1, blocks=(6, 2))", None),
        ("Partial(sum)", None),
    ],
)
def test_rank_part(placement: str, expected: list[int] | None) -> None:
    part = rank_part(torch.arange(8), 2, 1, placement, {"n": 2})
    assert (part if part is None else part.tolist()) == expected
