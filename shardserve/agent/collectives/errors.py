"""What ends a generation from inside a collective."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class CollectiveBroken(Exception):
    """A group can't go on together: a rank is at another collective, unreachable, or was waited for too long; or what
    it is to do can't be done, with the same tensor on all ranks and so with zeros (Program.drain), too.
    """


def rows_of_a_part(x: Tensor, size: int) -> int:
    """Of a reduce_scatter's result; CollectiveBroken unless each of `size` ranks gets as many."""
    if x.dim() == 0 or x.shape[0] % size:
        raise CollectiveBroken(f"reduce_scatter of {list(x.shape)}: its first dim can't be divided by {size} ranks")
    return x.shape[0] // size


def check_splits(x: Tensor, input_splits: Sequence[int], size: int) -> None:
    """CollectiveBroken unless the splits of an all_to_all are one a rank and cover the rows of `x`."""
    if len(input_splits) != size or x.dim() == 0 or sum(input_splits) != x.shape[0] or min(input_splits) < 0:
        raise CollectiveBroken(f"all_to_all of {list(x.shape)} in {list(input_splits)} rows to {size} ranks")
