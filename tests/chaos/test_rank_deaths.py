"""kill -9 of ranks under load: the group re-forms by itself, survivors keep their processes, clients see a pause."""

import os
import signal

import numpy as np
import pytest
import torch
from load import SECONDS_TO_RECOVER, Load, kill_at_once
from models import dividing
from serving import token_ids, transformer_instances, transformer_reference

from shardserve.client import status


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


def test_poisonous_requests_among_many_are_given_up_alone(dividing_model):
    """Each kills one replica after the other, at first in a batch with others, while the windows of both are full."""
    with dividing_model.up(SHARDSERVE_MAX_RESTARTS="3") as up, up.client() as client:
        x = np.random.default_rng(3).standard_normal((80, dividing.WIDTH), dtype=np.float32)
        n, d = np.arange(80) * 7, np.arange(80) + 1
        with torch.inference_mode():
            expected = dividing_model.model(*map(torch.from_numpy, (x, n, d)))[0].numpy()
        for _ in range(3):
            before = restarts(up)
            pending = [client.infer_async({"x": x[i], "n": n[i], "d": d[i]}, timeout=30 + i % 7) for i in range(40)]
            lowest = {"x": x[0], "n": np.int64(dividing.LOWEST), "d": np.int64(-1)}
            poison = client.infer_async(lowest, timeout=30)
            pending += [client.infer_async({"x": x[i], "n": n[i], "d": d[i]}, timeout=20) for i in range(40, 80)]
            for i, request in enumerate(pending):
                (result,) = request.result()
                assert "error" not in result, result
                np.testing.assert_allclose(result["y"], expected[i], atol=1e-5)
                assert result["quotient"] == n[i] // d[i]
            assert "generations of the group ended while this request ran" in poison.result()["error"]
            # Main hears of the last end before it has another answer, not before it has this one.
            assert "y" in client.infer({"x": x[0], "n": n[0], "d": d[0]}, timeout=30)[0]
            # Two if it had its first step for itself.
            assert restarts(up) - before in (2, 3)
        assert up.stop() == 0


def restarts(up):
    return sum(replica["restarts"] for replica in status(up.grpc)["servables"][0]["replicas"])
