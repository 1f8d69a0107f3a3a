"""kill -9 of the user's own scripts: the other side waits, then goes on or leaves, and nothing is left."""

import os
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest
from serving import Processes, Up, copy_matmul_example

from shardserve.client import Client

RECONNECT_SECONDS = 2


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The reference example's folder, exported."""
    folder = copy_matmul_example(tmp_path_factory.mktemp("example"))
    script = folder / "export_model" / "export_model.py"
    subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL)
    return folder


def test_the_launcher_with_its_supervisor(example):
    with Up(example, example / "model", "matmul") as up:
        os.kill(up.process.pid, signal.SIGKILL)
        up.wait_all_ended(20)


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


def assert_answers(seconds=30):
    with grpc.insecure_channel("127.0.0.1:5500") as channel:
        grpc.channel_ready_future(channel).result(90)
    with Client("127.0.0.1:5500", "matmul", "predict", raise_errors=True) as client:
        (result,) = client.infer({"x": np.ones((128, 96), np.float32)}, timeout=seconds)
    np.testing.assert_array_equal(result["y"], np.full((128, 16), -48, np.float32))


@pytest.mark.usefixtures("example_ports")
def test_scripts_on_their_own(example):
    """The server's script, then the agents' script, are killed; the other side waits, then goes on or leaves."""
    with Scripts(example) as scripts:
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
