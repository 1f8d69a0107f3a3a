"""A few models of the zoo, of distinct kinds; `make bench-zoo` measures all of them in all layouts."""

from __future__ import annotations

import pytest

from benchmarks.zoo import MODELS, make
from benchmarks.zoo.measure import MOST_BYTES, MOST_FLOPS, rows

LAYOUTS = ("tp2", "pp2", "tp2pp2")
# PyTorch takes seconds for each layout of a larger one: those have the one that is both cut and sharded.
LARGER = ("llama", "vit", "unet", "bf16")


@pytest.mark.parametrize("name", [*LARGER, "dlrm", "nested", "tied_weights", "updated_buffers"])
def test_models(name: str) -> None:
    """Exported, equal to the whole model at several sizes, with the hand plan's collectives and a rank's fair share."""
    case = make(name)
    layouts = ("tp2pp2",) if name in LARGER else LAYOUTS
    measured = rows(name, case, layouts)
    assert [row.layout for row in measured] == list(layouts)
    for row in measured:
        assert row.failure is None
        assert row.missed == (), row
        assert row.sizes >= 5
        if row.layout != "pp2":
            assert row.replicated < 0.5
            assert not case.bounded or (row.bytes <= MOST_BYTES and row.flops <= MOST_FLOPS)
            assert row.collectives > 0


def test_all_families_are_there() -> None:
    assert len(MODELS) > 40
    assert {"bert", "mixtral", "t5", "swin", "whisper", "mamba", "unet2d_condition", "dit", "dlrm"} <= MODELS.keys()
