"""kill -9 of ranks under load: the group re-forms by itself, survivors keep their processes, clients see a pause."""

import os
import signal

import numpy as np
import pytest
from load import SECONDS_TO_RECOVER, Load, kill_at_once
from serving import token_ids, transformer_instances, transformer_reference


def kill_and_recover(up, load, victims):
    """Kills the agents of these ranks; all others keep their pids, and all clients go on without an error."""
    before = up.pids()
    kill_at_once(up, [before[rank] for rank in victims])
    assert load.wait(1) < SECONDS_TO_RECOVER
    load.wait(20)
    after = up.pids()
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old == new) == (rank not in victims), f"rank {rank}: pid {old} became {new}"


def test_each_rank_in_turn_under_load(transformer, up):
    restarts = up.replica()["restarts"]
    with Load(up, transformer.model) as load:
        for rank in range(4):
            generation = up.replica()["generation"]
            kill_and_recover(up, load, {rank})
            assert up.replica()["generation"] != generation
    assert up.replica()["restarts"] == restarts + 4


@pytest.mark.parametrize("victims", [{0, 3}, {0, 1, 2, 3}], ids=["two", "all"])
def test_several_ranks_at_once(transformer, up, victims):
    with Load(up, transformer.model) as load:
        kill_and_recover(up, load, victims)


def test_a_rank_that_dies_while_nothing_is_under_way(transformer, up):
    ids = token_ids(1, 6, seed=1)
    with up.client(raise_errors=True) as client:
        for rank in range(4):
            os.kill(up.pids()[rank], signal.SIGKILL)
            (result,) = client.infer(transformer_instances(ids), timeout=SECONDS_TO_RECOVER)
            np.testing.assert_allclose(result["logits"], transformer_reference(transformer.model, ids)[0], atol=1e-5)


def test_a_rank_over_gloo(transformer):
    with transformer.up(SHARDSERVE_COLLECTIVE="gloo") as up:
        with Load(up, transformer.model, clients=2) as load:
            before = up.pids()
            os.kill(before[1], signal.SIGKILL)
            # A survivor that is blocked inside gloo is killed and forked anew, so pids may change.
            assert load.wait(1) < SECONDS_TO_RECOVER
            load.wait(5)
        assert up.stop() == 0
