"""gloo behind the same interface: the same results as through shared memory, for every dtype of a shard."""

import pytest
import torch

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.shards.config import DTYPES as DTYPE_NAMES

from .ranks import run_gloo
from .test_shared_memory import every_operation

pytestmark = pytest.mark.usefixtures("nothing_left")


def every_dtype(member):
    every_operation(member, [(), (6, 5), (0, 3), (12,)], [getattr(torch, name) for name in sorted(DTYPE_NAMES)])


@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_and_dtype(size, tmp_path):
    run_gloo(every_dtype, size, tmp_path)


def impossible(member):
    collective = member.join()
    with pytest.raises(
        CollectiveBroken, match=r"reduce_scatter of \[7, 2\]: its first dim can't be divided by 2 ranks"
    ):
        collective.reduce_scatter(torch.ones(7, 2), "sum")
    with pytest.raises(CollectiveBroken, match=r"all_to_all of \[3\] in \[1, 1\] rows to 2 ranks"):
        collective.all_to_all(torch.ones(3), [1, 1], [1, 1])
    assert collective.all_reduce(torch.ones(2), "sum").tolist() == [2.0, 2.0]


def test_what_ranks_cannot_share_is_an_error_before_anything_is_exchanged(tmp_path):
    run_gloo(impossible, 2, tmp_path)
