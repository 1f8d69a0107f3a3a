"""Deaths again and again: the request that brings them is given up; a rank or Main that dies too often ends all."""

import os
import signal
import threading

import numpy as np


def test_a_request_under_which_two_generations_end_is_given_up_and_others_are_answered(slow_model):
    """The request's step takes seconds; whenever it runs, a rank is killed, as a poisonous input would."""
    rows = 30_000
    with slow_model.up() as up, up.client() as client, up.client(raise_errors=True) as other:
        small = np.ones((2, 256), np.float32)
        (expected,) = other.infer({"x": small}, timeout=30)
        poison = client.infer_async({"x": np.ones((rows, 256), np.float32)}, timeout=120)
        for _ in range(2):
            wait_until_computing(up.pids()[0])
            generation = up.replica()["generation"]
            os.kill(up.pids()[1], signal.SIGKILL)
            wait_for_generation_after(up, generation)
        reply = poison.result()
        assert "ABORTED" in reply["error"]
        assert "2 generations" in reply["error"]
        (result,) = other.infer({"x": small}, timeout=30)
        np.testing.assert_array_equal(result["y"], expected["y"])
        assert up.stop() == 0


def test_a_request_that_lived_through_one_death_is_answered(slow_model):
    with slow_model.up() as up, up.client(raise_errors=True) as client:
        x = np.random.default_rng(2).standard_normal((10_000, 256), dtype=np.float32)
        pending = client.infer_async({"x": x}, timeout=120)
        wait_until_computing(up.pids()[0])
        os.kill(up.pids()[1], signal.SIGKILL)
        (result,) = pending.result()
        (again,) = client.infer({"x": x}, timeout=120)
        np.testing.assert_array_equal(result["y"], again["y"])
        assert up.stop() == 0


def test_poisonous_requests_do_not_use_up_the_restarts(slow_model):
    """Each takes two deaths of each rank, as an input does on which all crash; with two of them there are more deaths
    than a rank may have of its own."""
    with slow_model.up(SHARDSERVE_MAX_RESTARTS="3") as up, up.client() as client:
        for _ in range(3):
            poison = client.infer_async({"x": np.ones((30_000, 256), np.float32)}, timeout=120)
            for _ in range(2):
                pids = up.pids()
                wait_until_computing(pids[0])
                generation = up.replica()["generation"]
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                wait_for_generation_after(up, generation)
            assert "ABORTED" in poison.result()["error"]
        assert "y" in client.infer({"x": np.ones((2, 256), np.float32)}, timeout=30)[0]
        assert up.stop() == 0


def wait_until_computing(pid, ticks=20):
    """Until the process has used so much more processor time (0.01 s a tick): it is inside its step."""
    start = processor_ticks(pid)
    pause = threading.Event()
    for _ in range(3000):
        if processor_ticks(pid) >= start + ticks:
            return
        pause.wait(0.02)
    raise AssertionError(f"pid {pid} computes nothing")


def processor_ticks(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_for_generation_after(up, generation):
    pause = threading.Event()
    for _ in range(3000):
        replica = up.replica()
        if replica["state"] == "serving" and replica["generation"] != generation:
            return
        pause.wait(0.02)
    raise AssertionError(f"still {generation}")


def test_a_rank_that_dies_too_often_ends_up_with_an_error(slow_model, capfd):
    with slow_model.up(SHARDSERVE_MAX_RESTARTS="2") as up:
        with up.client(raise_errors=True) as client:
            for _ in range(2):
                os.kill(up.pids()[1], signal.SIGKILL)
                client.infer({"x": np.ones((2, 256), np.float32)}, timeout=60)
            os.kill(up.pids()[1], signal.SIGKILL)
        assert up.process.wait(60) == 1
        up.wait_all_ended(20)
    assert "rank 1: died 3 times within 60 s" in capfd.readouterr().err


def test_main_dies_too_often(slow_model, capfd):
    with slow_model.up(SHARDSERVE_MAX_RESTARTS="1") as up:
        (first,) = up.of("shardserve.main")
        os.kill(first, signal.SIGKILL)
        second = wait_for_another_main(up, first)
        os.kill(second, signal.SIGKILL)
        assert up.process.wait(60) == 1
        up.wait_all_ended(20)
    assert "Main died 2 times within 60 s" in capfd.readouterr().err


def wait_for_another_main(up, pid):
    pause = threading.Event()
    for _ in range(6000):
        others = set(up.of("shardserve.main")) - {pid}
        if others:
            return others.pop()
        pause.wait(0.01)
    raise AssertionError("Main was not respawned")
