"""The reference example to the letter: its own scripts, each a process, on its own ports."""

import json
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
import torch
from serving import EXAMPLES, Processes, copy_matmul_example, load_module, shared_memory_files

from shardserve.client import Client
from shardserve.wire.sockets import connect_within, parse_address

pytestmark = pytest.mark.usefixtures("example_ports")

GRPC, REST = "127.0.0.1:5500", "127.0.0.1:1500"
NET = EXAMPLES / "matmul_distributed" / "export_model" / "net.py"


def export(folder, *arguments):
    script = folder / "export_model" / "export_model.py"
    subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.DEVNULL)


def wait_until_served():
    """serving_server.py opens its ports when all agents are ready: that of REST is the last thing that it does."""
    for address in (GRPC, REST):
        found = connect_within(parse_address(address, "test"), 90, 0.05, threading.Event(), local_only=False)
        assert found is not None
        found.close()


@pytest.mark.parametrize("order", [("server", "agent"), ("agent", "server")], ids="-".join)
def test_by_hand_servers_and_agents_in_either_order(tmp_path, order):
    folder = copy_matmul_example(tmp_path)
    export(folder)
    before = shared_memory_files()
    with Processes() as processes:
        first, second = (processes.start(folder / f"serving_{name}.py") for name in order)
        server, agents = (first, second) if order[0] == "server" else (second, first)
        wait_until_served()
        printed = subprocess.run(
            [sys.executable, folder / "serving_client.py"], check=True, capture_output=True, text=True
        ).stdout
        assert "-48." in printed
        with Client("localhost:5500", "matmul", "predict") as client:
            result = client.infer({"x": np.ones((128, 96), np.float32)})
        assert list(result[0]) == ["y"]
        np.testing.assert_array_equal(result[0]["y"], np.full((128, 16), -48, np.float32))
        server.terminate()
        assert server.wait(60) == 0
        # The server told the agents to leave.
        assert agents.wait(60) == 0
        processes.wait_all_ended(20)
    assert shared_memory_files() <= before


def test_random_weights_and_inputs_over_grpc_and_rest(tmp_path):
    folder = copy_matmul_example(tmp_path)
    export(folder, "--random", "3")
    net = load_module(NET).Net(3)
    random = np.random.default_rng(3)
    with Processes() as processes:
        agents = processes.start(folder / "serving_agent.py")
        server = processes.start(folder / "serving_server.py")
        wait_until_served()
        with Client("localhost:5500", "matmul", "predict", raise_errors=True) as client:
            for _ in range(20):
                x = random.standard_normal((128, 96), dtype=np.float32)
                (result,) = client.infer({"x": x})
                np.testing.assert_allclose(result["y"], reference(net, x), atol=1e-5)
        x = random.standard_normal((128, 96), dtype=np.float32)
        body = json.dumps({"instances": {"x": x.tolist()}}).encode()
        request = urllib.request.Request(f"http://{REST}/model/matmul:predict", body)
        with urllib.request.urlopen(request, timeout=30) as reply:
            y = np.array(json.load(reply)["instances"][0]["y"], np.float32)
        np.testing.assert_allclose(y, reference(net, x), atol=1e-5)
        # The agents' own signal ends them and leaves the server waiting for others.
        agents.terminate()
        assert agents.wait(60) == 0
        assert server.poll() is None
        server.terminate()
        assert server.wait(60) == 0
        processes.wait_all_ended(20)


def reference(net, x):
    with torch.inference_mode():
        return net(torch.from_numpy(x)).numpy()
