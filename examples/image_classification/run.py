"""Exports EfficientNet-Lite0 for 2 pipeline stages if that isn't done, serves it, classifies pictures, and stops.

python run.py
"""

import argparse
import io
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from efficientnet.preprocessing import pixels
from net import example
from PIL import Image
from skimage import data

from shardserve import server
from shardserve.client import Client
from shardserve.export import export

HERE = Path(__file__).resolve().parent
NAME = "efficientnet"
RANKS = 2
CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}


def main():
    parser = argparse.ArgumentParser(description="Serve the image classifier, check it, stop.")
    parser.add_argument("--distributed-address", default="127.0.0.1:6200", metavar="IP:PORT")
    parser.add_argument("--agent-start-port", type=int, default=7000, metavar="N")
    flags = parser.parse_args()
    model, args, options = example()
    if not (HERE / "model").is_dir():
        print(export(model, args, name=NAME, out=HERE / "model", pipeline_parallel=RANKS, **options))
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/grpc.sock"
        server.start_grpc_server(address)
        serve(flags.distributed_address, flags.agent_start_port)
        failed = classify(address) + compare(address, model.eval())
        server.stop()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("stopped")


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


def encoded(picture, kind):
    """The file of a picture that scikit-image brings as an array."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def pictures():
    """name → file, and what one of the labels has to be; "camera" is grey."""
    return {
        "a cat": (encoded(data.cat(), "PNG"), CATS),
        "coffee": (encoded(data.coffee(), "JPEG"), {"espresso"}),
        "a camera": (encoded(data.camera(), "PNG"), {"tripod"}),
    }


def classify(address):
    """The names of the checks that failed."""
    known = pictures()
    files = [file for file, _ in known.values()]
    with Client(address, NAME, "classify") as client:
        *answers, refused = client.infer([{"picture": file} for file in [*files, b"not a picture"]], timeout=60)
    failed = []
    for (name, (_, wanted)), answer in zip(known.items(), answers, strict=True):
        pairs = zip(answer["labels"], answer["probabilities"], strict=True)
        print(f"{name}: {', '.join(f'{label} {probability:.3f}' for label, probability in pairs)}")
        if not wanted.intersection(answer["labels"].tolist()):
            failed.append(f"{name} is none of {', '.join(sorted(wanted))}")
    print(f"no picture: {refused}")
    return failed if "error" in refused else [*failed, "no picture"]


def compare(address, model):
    files = [file for file, _ in pictures().values()]
    with Client(address, NAME, "predict", raise_errors=True) as client:
        logits = np.stack([answer["logits"] for answer in client.infer([{"picture": file} for file in files])])
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.stack([pixels(file) for file in files]))).numpy()
    error = np.abs(logits - expected).max()
    print(f"{len(files)} pictures: logits from {logits.min():.1f} to {logits.max():.1f}, largest error {error:.1e}")
    return [] if error < 1e-4 else ["the same as the unsharded model"]


if __name__ == "__main__":
    main()
