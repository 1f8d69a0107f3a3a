"""Exports the transformer for 2 pipeline stages of 2 ranks if that isn't done, serves it, asks, and stops.

python run.py
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path

import export_model
import numpy as np
import torch
from net import example

from shardserve import server
from shardserve.client import Client

HERE = Path(__file__).resolve().parent
RANKS = 4
LENGTHS = (5, 12, 12, 64)


def main():
    parser = argparse.ArgumentParser(description="Serve the transformer example, ask it, compare with the whole model.")
    parser.add_argument("--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT")
    parser.add_argument("--agent-start-port", type=int, default=7000, metavar="N")
    flags = parser.parse_args()
    if not (HERE / "model").is_dir() and export_model.main([]) != 0:
        sys.exit("the shards differ from the model")
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/grpc.sock"
        server.start_grpc_server(address)
        serve(flags.distributed_address, flags.agent_start_port)
        ask(address)
        server.stop()
    print("stopped")


def serve(address, port):
    files = [f"model/device{rank}/transformer.graph.json" for rank in range(RANKS)]
    # Usually a script of its own on each host; what a thread raises would be lost, so the server waits with a limit.
    agents = threading.Thread(
        target=server.distributed.startup_agents, args=(address, files), kwargs={"agent_start_port": port}
    )
    agents.start()
    server.distributed.start_servable(
        ".", "transformer", "rank_table.json", distributed_address=address, wait_agents_time_in_seconds=100
    )
    agents.join()


def ask(address):
    """Prompts of different lengths in one request; each is compared with the unsharded model's answer."""
    random = np.random.default_rng(9)
    prompts = [random.integers(0, 256, length) for length in LENGTHS]
    with Client(address, "transformer", "predict", raise_errors=True) as client:
        answers = client.infer([{"ids": ids, "attention_mask": np.ones_like(ids)} for ids in prompts], timeout=60)
    model = example()[0].eval()
    for ids, answer in zip(prompts, answers, strict=True):
        batch = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            expected = model(batch, torch.ones_like(batch))[0].numpy()
        error = np.abs(answer["logits"] - expected).max()
        print(f"{len(ids)} tokens: logits of shape {answer['logits'].shape}, largest error {error:.1e}")
        assert error < 1e-5


if __name__ == "__main__":
    main()
