"""A few models of the zoo, of distinct kinds, in three layouts; `make bench-zoo` measures all of them."""

from __future__ import annotations

import pytest

from benchmarks.zoo import MODELS, make
from benchmarks.zoo.measure import MOST_BYTES, MOST_FLOPS, rows

LAYOUTS = ("tp2", "pp2", "tp2pp2")


@pytest.mark.parametrize("name", ["llama", "vit", "dlrm", "unet", "nested", "tied_weights", "bf16", "updated_buffers"])
def test_models(name: str) -> None:
    """Exported, equal to the whole model at several sizes, with the hand plan's collectives and a rank's fair share."""
    case = make(name)
    measured = rows(name, case, LAYOUTS)
    assert [row.layout for row in measured] == list(LAYOUTS)
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
