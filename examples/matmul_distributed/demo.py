"""The whole example by one command: export, serve on 8 ranks, call over gRPC and REST, lose a rank, stop.

Ones and constant weights can't tell a right answer from a wrong slice, so the second half serves a randomly initialised
net of the same shapes and sends it random inputs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

from shardserve.client import Client, status

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "export_model"))
from net import Net  # noqa: E402

SEED = 7
GRPC, REST = "127.0.0.1:5500", "127.0.0.1:1500"


def script(*arguments, **options):
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def run(*arguments):
    if script(*arguments).wait() != 0:
        sys.exit(f"demo: {' '.join(map(str, arguments))} failed")


def post(x):
    body = json.dumps({"instances": {"x": x.tolist()}}).encode()
    request = urllib.request.Request(f"http://{REST}/model/matmul:predict", body)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return np.array(json.load(reply)["instances"][0]["y"], np.float32)


def reference_example():
    """The scripts as a user runs them, agents first; gives the children to stop."""
    agents = script(HERE / "serving_agent.py")
    server = script(HERE / "serving_server.py", stdout=subprocess.PIPE)
    try:
        wait_until_ready(server)
        with Client(GRPC, "matmul", "predict") as client:
            y = client.infer({"x": np.ones((128, 96), np.float32)})[0]["y"]
        print(f"gRPC: y of shape {y.shape}, from {y.min():g} to {y.max():g}")
        y = post(np.ones((128, 96), np.float32))
        print(f"REST: y of shape {y.shape}, from {y.min():g} to {y.max():g}")
        assert (y == -48).all()
    finally:
        stop(server)
        # The server told the agents to leave, so their script ends by itself; if not, it is stopped.
        stop(agents)


def wait_until_ready(server):
    """serving_server.py prints nothing; its ports answer when all agents are there."""
    deadline = time.monotonic() + 120
    with Client(GRPC, "matmul", "predict") as client:
        while "error" in client.infer({"x": np.ones((128, 96), np.float32)}, timeout=5):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("demo: the server did not get ready")
            time.sleep(0.2)


def random_net(folder):
    run(HERE / "export_model" / "export_model.py", "--random", SEED, "--out", folder)
    command = ("-m", "shardserve.cli", "up", HERE, "--model-dir", folder)
    up = script(*command, stdout=subprocess.PIPE, text=True)
    try:
        line = up.stdout.readline()
        if not line.startswith("ready"):
            sys.exit("demo: shardserve up did not get ready")
        print(line, end="")
        random = np.random.default_rng(SEED)
        net = Net(SEED)
        with Client(GRPC, "matmul", "predict", raise_errors=True) as client:
            worst = max(error(net, client, random) for _ in range(20))
            print(f"largest error on 20 random inputs: {worst:.2g}")
            victim = status(GRPC)["servables"][0]["replicas"][0]["ranks"][3]
            os.kill(victim["pid"], signal.SIGKILL)
            start = time.perf_counter()
            worst = max(worst, error(net, client, random))
            took = time.perf_counter() - start
        print(f"kill -9 of rank 3 (pid {victim['pid']}): the next right answer came after {took * 1e3:.0f} ms")
        assert worst <= 1e-5
    finally:
        stop(up)


def error(net, client, random):
    x = random.standard_normal((128, 96), dtype=np.float32)
    y = client.infer({"x": x}, timeout=60)[0]["y"]
    with torch.inference_mode():
        return float(np.abs(y - net(torch.from_numpy(x)).numpy()).max())


def stop(child):
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
    if child.wait(timeout=30) != 0:
        print(f"demo: {' '.join(child.args)} ended with {child.returncode}", file=sys.stderr)


def main():
    run(HERE / "export_model" / "export_model.py")
    reference_example()
    with tempfile.TemporaryDirectory() as folder:
        random_net(folder)
    print("demo: all stopped")


if __name__ == "__main__":
    main()
