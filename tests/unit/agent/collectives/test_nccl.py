"""What of NCCL's collectives runs without a GPU: our part of them, over a gloo group of the same calls."""

from datetime import timedelta

import pytest
import torch

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.collectives.interfaces import interface_of
from shardserve.agent.collectives.nccl import NcclCollective
from shardserve.agent.collectives.torch_group import dist
from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.shards.config import DTYPES as DTYPE_NAMES
from shardserve.wire.messages import Generation

from .ranks import GlooMember, run_gloo
from .test_shared_memory import every_operation

pytestmark = pytest.mark.usefixtures("nothing_left")
CPU = torch.device("cpu")


class OverGloo(GlooMember):
    def join(self):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = timedelta(seconds=30)
        self.lifetime = Lifetime(Generation(1, 1))
        self.group = dist.ProcessGroupGloo(self.store, self.rank, self.size, options)
        return NcclCollective(self.group, self.rank, self.size, CPU, self.lifetime)


def every_dtype(member):
    # Not bool: NCCL makes a sum of them, gloo doesn't.
    every_operation(
        member, [(), (6, 5), (0, 3), (12,)], [getattr(torch, name) for name in sorted(DTYPE_NAMES - {"bool"})]
    )


@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_and_dtype(size, tmp_path):
    run_gloo(every_dtype, size, tmp_path, OverGloo)


def ends(member):
    collective = member.join()
    collective.all_reduce(torch.ones(2), "sum")
    collective.finish()
    collective.all_reduce(torch.ones(2), "sum")
    member.lifetime.end()
    with pytest.raises(GenerationEnded):
        collective.finish()
    with pytest.raises(GenerationEnded):
        collective.all_reduce(torch.ones(2), "sum")


def test_nothing_is_taken_from_a_generation_that_has_ended(tmp_path):
    run_gloo(ends, 2, tmp_path, OverGloo)


def fails(member):
    collective = member.join()
    if member.rank:
        # The other sees this connection end.
        return
    with pytest.raises(CollectiveBroken, match="NCCL failed: "):
        collective.all_reduce(torch.ones(2), "sum")
    member.lifetime.end()
    with pytest.raises(GenerationEnded):
        collective.all_reduce(torch.ones(2), "sum")


def test_an_error_of_the_library_breaks_the_group(tmp_path):
    run_gloo(fails, 2, tmp_path, OverGloo)


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == interface_of("localhost") == "lo"
    # Of documentation, and of IPv6; and a name that is none.
    assert [interface_of(host) for host in ("192.0.2.1", "::1", "no.such.host.invalid")] == [None] * 3
