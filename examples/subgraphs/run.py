"""Exports two subgraphs for two ranks, serves both behind two methods, calls them, and stops. `python run.py`"""

import argparse
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from net import PLAN, PROMPT, WORDS, Net, Read, Step, read, step

from shardserve import server
from shardserve.client import Client
from shardserve.export import Plan, export

HERE = Path(__file__).resolve().parent
RANKS = 2
COUNT = 12


def main():
    parser = argparse.ArgumentParser(description="Two methods over a model with two subgraphs.")
    parser.add_argument("--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT")
    address = parser.parse_args().distributed_address
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("read", read), ("step", step)):
            model, args, options = make()
            plan = Plan.from_dict(PLAN)
            export(model, args, name=name, out=Path(folder) / name, tensor_parallel=RANKS, plan=plan, **options)
        serve(Path(folder), address)
        call(f"unix:{folder}/grpc.sock")
        server.stop()
    print("stopped")


def serve(folder, address):
    table = folder / "rank_table.json"
    devices = [{"device_id": str(rank), "device_ip": "127.0.0.1", "rank_id": str(rank)} for rank in range(RANKS)]
    table.write_text(json.dumps({"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}))
    server.start_grpc_server(f"unix:{folder}/grpc.sock")
    # Usually a script of its own, on each host: an item of model_files is the list of one rank's subgraphs.
    subgraphs = [
        [str(folder / f"{name}/device{rank}/{name}.graph.json") for name in ("read", "step")] for rank in range(RANKS)
    ]
    agents = threading.Thread(target=server.distributed.startup_agents, args=(address, subgraphs))
    agents.start()
    server.distributed.start_servable(str(HERE), "words", str(table), distributed_address=address)
    agents.join()


def call(address):
    ids = np.random.default_rng(5).integers(0, WORDS, (4, PROMPT))
    with Client(address, "words", "read", raise_errors=True) as client:
        answers = client.infer([{"ids": row} for row in ids], timeout=60)
    print(f"read: {len(answers)} instances, scores of shape {answers[0]['scores'].shape}")
    with Client(address, "words", "generate", raise_errors=True) as client:
        answers = client.infer([{"ids": row, "count": COUNT} for row in ids], timeout=60)
    for row, answer in zip(ids, answers, strict=True):
        print(f"generate: {row.tolist()} → {answer['words'].tolist()}")
        assert answer["words"].tolist() == expected(row)
    print("the same as the whole model in this process")


def expected(ids):
    net = Net()
    words = []
    with torch.inference_mode():
        scores, state = Read(net)(torch.from_numpy(ids)[None])
        words.append(int(scores.argmax()))
        while len(words) < COUNT:
            scores, state = Step(net)(state, torch.tensor([words[-1]]))
            words.append(int(scores.argmax()))
    return words


if __name__ == "__main__":
    main()
