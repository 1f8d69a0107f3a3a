"""Exports a model for one device, serves two replicas of it, loses one, and stops. `python run.py`"""

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from shardserve import server
from shardserve.client import Client, status
from shardserve.export import export

HERE = Path(__file__).resolve().parent


def make():
    """x float32 [batch, 64] → y float32 [batch, 8]; for `shardserve export run:make`, too."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    options = {
        "dynamic_shapes": {"input": {0: Dim("batch", min=1, max=16)}},
        "input_names": ["x"],
        "output_names": ["y"],
    }
    return model, (torch.ones(2, 64),), options


def main():
    model, args, options = make()
    with tempfile.TemporaryDirectory() as folder:
        servable = Path(folder) / "mlp"
        servable.mkdir()
        (servable / "servable_config.py").write_text((HERE / "mlp" / "servable_config.py").read_text())
        export(model, args, name="mlp", out=servable / "1", **options)
        server.start_servables(server.ServableStartConfig(folder, "mlp", device_ids=[0, 1]))
        address = f"unix:{folder}/grpc.sock"
        server.start_grpc_server(address)
        x = np.random.default_rng(1).standard_normal((200, 64), dtype=np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(x)).numpy()
        with Client(address, "mlp", "predict", raise_errors=True) as client:
            first, second = (replica["ranks"][0]["pid"] for replica in status(address)["servables"][0]["replicas"])
            print(f"two replicas: pid {first} and pid {second}")
            check(client, x, expected)
            os.kill(first, signal.SIGKILL)
            check(client, x, expected)
            print(f"pid {first} was killed; the other one answered, and it is started anew")
        server.stop()
    print("stopped")


def check(client, x, expected):
    answers = client.infer([{"x": row} for row in x], timeout=60)
    worst = max(np.abs(answer["y"] - y).max() for answer, y in zip(answers, expected, strict=True))
    print(f"{len(answers)} instances, largest error {worst:.1e}")
    assert worst < 1e-5


if __name__ == "__main__":
    main()
