"""How often something is started again."""

import dataclasses

from shardserve import restarts
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


def test_deaths_that_are_forgiven_keep_no_other_in_the_window(monkeypatch):
    now = 0.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    budget = RestartBudget(dataclasses.replace(Settings(), restart_window=60, max_restarts=10))
    # Each hour one of its own, and all the time some that a request is to blame for.
    for minute in range(60 * 20):
        now = 60.0 * minute
        if minute % 60 == 0:
            budget.spend()
        for second in range(12):
            now = 60.0 * minute + 5 * second
            budget.spend()
            budget.forgive()
            assert not budget.spent
    assert budget.pause == 0
