"""How often something is started again."""

import dataclasses

from shardserve.restarts import LONGEST_PAUSE, RestartBudget
from shardserve.settings import Settings


def test_pauses_double_up_to_the_longest_however_many_deaths_there_are():
    budget = RestartBudget(dataclasses.replace(Settings(), restart_window=1e6))
    pauses = []
    for _ in range(2000):
        budget.spend()
        pauses.append(budget.pause)
    assert pauses[:6] == [0, 0, 0, 0.1, 0.2, 0.4]
    assert set(pauses[9:]) == {LONGEST_PAUSE}
