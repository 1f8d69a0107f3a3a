"""What an agent needs of a collective, beside the interface of shards.collective."""

from __future__ import annotations

from typing import Protocol

from shardserve.shards.collective import Collective, SingleRank


class GroupCollective(Collective, Protocol):
    """What a membership needs of its group beside the collectives themselves."""

    def begin(self, step: int) -> None:
        """What follows is of this step."""
        return

    def finish(self) -> None:
        """The step's operators are done, on the device, too. CollectiveBroken or GenerationEnded if one of its
        collectives was not: then what it gave is nobody's.
        """
        return


class Alone(SingleRank, GroupCollective):
    """The group of one rank."""
