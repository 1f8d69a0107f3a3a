"""Exports a decoder in two subgraphs, generates for two clients at once, kills a rank meanwhile. `python run.py`"""

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from net import LONGEST, WORDS, Decoder, make

from shardserve import server
from shardserve.client import Client, status
from shardserve.export import Plan, export_subgraphs

HERE = Path(__file__).resolve().parent
RANKS, STAGES = 4, 2
COUNT = 64


def main():
    parser = argparse.ArgumentParser(description="Generation with a key-value cache, on 4 ranks.")
    parser.add_argument("--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT")
    parser.add_argument("--agent-start-port", type=int, default=7000, metavar="PORT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, _, options = make()
        reports = export_subgraphs(
            model,
            options["subgraphs"],
            name="story",
            out=Path(folder) / "model",
            tensor_parallel=RANKS // STAGES,
            pipeline_parallel=STAGES,
            plan=Plan.from_dict(options["plan"]),
        )
        print(reports["decode"])
        serve(Path(folder), args.distributed_address, args.agent_start_port)
        address = f"unix:{folder}/grpc.sock"
        prompts = [np.random.default_rng(seed).integers(0, WORDS, size) for seed, size in ((1, 5), (2, 23))]
        two_at_once(address, prompts)
        kill_meanwhile(address, prompts)
        server.stop()
    print("stopped")


def serve(folder, address, port):
    table = folder / "rank_table.json"
    devices = [{"device_id": str(rank), "device_ip": "127.0.0.1", "rank_id": str(rank)} for rank in range(RANKS)]
    table.write_text(json.dumps({"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}))
    server.start_grpc_server(f"unix:{folder}/grpc.sock")
    subgraphs = [
        [str(folder / f"model/{name}/device{rank}/story.graph.json") for name in ("prefill", "decode")]
        for rank in range(RANKS)
    ]
    agents = threading.Thread(
        target=server.distributed.startup_agents, args=(address, subgraphs), kwargs={"agent_start_port": port}
    )
    agents.start()
    server.distributed.start_servable(str(HERE), "story", str(table), distributed_address=address)
    agents.join()


def generate(address, prompt, count=COUNT, timeout=60):
    """The words, or what the client is told instead."""
    with Client(address, "story", "generate") as client:
        answer = client.infer({"ids": prompt, "count": count}, timeout=timeout)
    answer = answer if isinstance(answer, dict) else answer[0]
    return answer["words"].tolist() if "words" in answer else answer["error"]


def two_at_once(address, prompts):
    wanted = [expected(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            started = time.perf_counter()
            answers = list(pool.map(lambda prompt: generate(address, prompt), prompts))
            took = time.perf_counter() - started
            assert answers == wanted, answers
    for prompt, words in zip(prompts, wanted, strict=True):
        print(f"{len(prompt)} words read, {len(words)} written: {words[:8]} …, {len(set(words))} different ones")
    print(f"the same as the whole model in this process; {len(prompts) * COUNT / took:.0f} words a second")


def kill_meanwhile(address, prompts):
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(generate, address, prompts[0], LONGEST - len(prompts[0]))
        # Until it has the group, so that a second call waits in vain.
        while "DEADLINE_EXCEEDED" not in str(generate(address, prompts[1], 1, timeout=0.5)):
            assert not long.done(), long.result()
        victim = status(address)["servables"][0]["replicas"][0]["ranks"][3]
        os.kill(victim["pid"], signal.SIGKILL)
        error = long.result()
    assert "ABORTED" in str(error), error
    print(f"kill -9 of rank 3 while it generated: {error}")
    assert generate(address, prompts[1]) == expected(prompts[1])
    print("the next call is answered, right")


def expected(prompt):
    model = Decoder()
    with torch.inference_mode():
        words = [int(model.prefill(torch.from_numpy(prompt)[None]).argmax())]
        while len(words) < COUNT:
            words.append(int(model.decode(torch.tensor(words[-1:])).argmax()))
    return words


if __name__ == "__main__":
    main()
