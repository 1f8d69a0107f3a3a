"""What hangs is found by a timeout, here a short one, and replaced, within some seconds more."""

import os
import signal

import pytest
from load import SECONDS_TO_RECOVER, Load

STEP_TIMEOUT = HEARTBEAT_TIMEOUT = 2
ABORT_TIMEOUT = 1


@pytest.fixture(scope="module")
def up(transformer):
    """One server with the short timeouts for all of them; after them it can be stopped."""
    limits = {
        "SHARDSERVE_STEP_TIMEOUT": str(STEP_TIMEOUT),
        "SHARDSERVE_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
    }
    with transformer.up(**limits) as up:
        yield up
        assert up.stop() == 0


def test_a_rank_that_hangs_is_ended_after_the_step_timeout(transformer, up):
    with Load(up, transformer.model, clients=2) as load:
        before = up.pids()
        os.kill(before[2], signal.SIGSTOP)
        # abort_timeout for the rank that doesn't leave.
        assert load.wait(1) < STEP_TIMEOUT + ABORT_TIMEOUT + SECONDS_TO_RECOVER
        load.wait(5)
        assert [old == new for old, new in zip(before, up.pids(), strict=True)] == [True, True, False, True]


def test_the_worker_while_a_rank_hangs(transformer, up):
    """The next Worker has never seen that rank, whose supervisor ends it."""
    before = up.pids()
    (worker,) = up.of("shardserve.worker")
    with Load(up, transformer.model, clients=2) as load:
        os.kill(before[2], signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        # The step's timeout, from when the next Worker has the supervisor, then abort_timeout.
        assert load.wait(1) < STEP_TIMEOUT + ABORT_TIMEOUT + SECONDS_TO_RECOVER
        load.wait(5)
        assert [old == new for old, new in zip(before, up.pids(), strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("role", ["worker", "main"])
def test_one_that_is_frozen_is_replaced(transformer, up, role):
    """Nothing of it ends by itself: only the heartbeat tells."""
    before = up.pids()
    (frozen,) = up.of(f"shardserve.{role}")
    with Load(up, transformer.model, clients=1, allowed_errors=("UNAVAILABLE",)) as load:
        os.kill(frozen, signal.SIGSTOP)
        assert load.wait(1) < HEARTBEAT_TIMEOUT + 1 + SECONDS_TO_RECOVER
        load.wait(20)
        assert up.pids() == before
    assert frozen not in up.of(f"shardserve.{role}")
