"""kill -9 of every other process: what must go on goes on, what must end ends, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
from load import SECONDS_TO_RECOVER, Load
from serving import Processes, copy_matmul_example

from shardserve.client import Client

RECONNECT_SECONDS = 2
# By a fork server: 1.3 to 4 s, and more on a machine that others use, too.
SECONDS_TO_IMPORT_TORCH = 20


def test_the_worker(transformer, up):
    """Main keeps the requests, the agents their weights."""
    before = up.pids()
    (worker,) = up.of("shardserve.worker")
    with Load(up, transformer.model) as load:
        os.kill(worker, signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_RECOVER
        load.wait(20)
        assert up.pids() == before
        assert up.of("shardserve.worker") != [worker]


def test_the_worker_while_a_rank_hangs(transformer):
    """The next Worker has never seen that rank, whose supervisor ends it."""
    with transformer.up(SHARDSERVE_STEP_TIMEOUT="2") as up:
        before = up.pids()
        (worker,) = up.of("shardserve.worker")
        with Load(up, transformer.model, clients=2) as load:
            os.kill(before[2], signal.SIGSTOP)
            os.kill(worker, signal.SIGKILL)
            # The step's timeout, from when the next Worker has the supervisor, then abort_timeout.
            assert load.wait(1) < 2 + 1 + SECONDS_TO_RECOVER
            load.wait(5)
            after = up.pids()
            assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True]
        assert up.stop() == 0


def test_main(transformer, up):
    """Connections end with it; clients that call again are answered."""
    before = up.pids()
    (main,) = up.of("shardserve.main")
    with Load(up, transformer.model, allowed_errors=("UNAVAILABLE",)) as load:
        os.kill(main, signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_RECOVER
        load.wait(20)
        assert up.pids() == before


@pytest.mark.parametrize("role", ["worker", "main"])
def test_one_that_is_frozen_is_replaced(transformer, role):
    """Nothing of it ends by itself: only the heartbeat tells."""
    with transformer.up(SHARDSERVE_HEARTBEAT_TIMEOUT="2") as up:
        before = up.pids()
        (frozen,) = up.of(f"shardserve.{role}")
        with Load(up, transformer.model, clients=1, allowed_errors=("UNAVAILABLE",)) as load:
            os.kill(frozen, signal.SIGSTOP)
            assert load.wait(1) < 3 + SECONDS_TO_RECOVER
            load.wait(20)
            assert up.pids() == before
        assert frozen not in up.of(f"shardserve.{role}")
        assert up.stop() == 0


def test_the_fork_server(transformer, up):
    """Its agents die with it; another one forks them anew."""
    before = up.pids()
    with Load(up, transformer.model) as load:
        os.kill(up.fork_server(), signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_IMPORT_TORCH + SECONDS_TO_RECOVER
        load.wait(20)
        assert not set(up.pids()) & set(before)


def test_the_launcher_with_its_supervisor(transformer):
    with transformer.up() as up:
        os.kill(up.process.pid, signal.SIGKILL)
        up.wait_all_ended(20)


def test_every_process_in_turn(transformer, up):
    agents = up.pids()
    victims = [*agents, up.fork_server(), *up.of("shardserve.worker"), *up.of("shardserve.main")]
    with Load(up, transformer.model, clients=2, allowed_errors=("UNAVAILABLE",)) as load:
        for pid in victims:
            # One of the fork server's deaths may have taken this agent already.
            if pid in up.alive():
                os.kill(pid, signal.SIGKILL)
                load.wait(2)


class Scripts(Processes):
    """The reference example's scripts."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def start_agents(self):
        return self.start(self.folder / "serving_agent.py")

    def start_server(self):
        return self.start(self.folder / "serving_server.py")

    def agents(self):
        """pids of agents and fork server."""
        return self.of("shardserve.agent.fork_server")


def exported_example(tmp_path):
    folder = copy_matmul_example(tmp_path)
    script = folder / "export_model" / "export_model.py"
    subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL)
    return folder


def assert_answers(seconds=30):
    with grpc.insecure_channel("127.0.0.1:5500") as channel:
        grpc.channel_ready_future(channel).result(90)
    with Client("127.0.0.1:5500", "matmul", "predict", raise_errors=True) as client:
        (result,) = client.infer({"x": np.ones((128, 96), np.float32)}, timeout=seconds)
    np.testing.assert_array_equal(result["y"], np.full((128, 16), -48, np.float32))


@pytest.mark.usefixtures("example_ports")
def test_scripts_on_their_own(tmp_path):
    """The server's script, then the agents' script, are killed; the other side waits, then goes on or leaves."""
    with Scripts(exported_example(tmp_path)) as scripts:
        agents, server = scripts.start_agents(), scripts.start_server()
        assert_answers()
        held = scripts.agents()

        # The agents keep their weights for a server that comes back in time, from another launcher.
        server.kill()
        server.wait()
        server = scripts.start_server()
        assert_answers()
        assert scripts.agents() == held

        # The agents end with their supervisor; others take their place, and the server goes on.
        agents.kill()
        agents.wait()
        scripts.wait_ended(held)
        scripts.environment["SHARDSERVE_RECONNECT_TIMEOUT"] = str(RECONNECT_SECONDS)
        agents = scripts.start_agents()
        assert_answers()

        # Without a server they leave after reconnect_timeout; nobody has asked them to, so it is an error.
        server.kill()
        assert agents.wait(RECONNECT_SECONDS + 60) == 1
        scripts.wait_all_ended(20)


def test_the_fork_server_while_it_forks(transformer, up):
    """All ranks die at once, and the fork server with them, before it could fork any of them anew."""
    with Load(up, transformer.model, clients=2) as load:
        for _ in range(2):
            agents, server = up.pids(), up.fork_server()
            # Else it would fork the first one anew before the last one is dead.
            os.kill(server, signal.SIGSTOP)
            for pid in (*agents, server):
                os.kill(pid, signal.SIGKILL)
            assert load.wait(1) < SECONDS_TO_IMPORT_TORCH + SECONDS_TO_RECOVER
            load.wait(5)


def test_main_dies_too_often(transformer, capfd):
    with transformer.up(SHARDSERVE_MAX_RESTARTS="1") as up:
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
