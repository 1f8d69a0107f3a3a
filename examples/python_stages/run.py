"""Exports the model, serves it with Python stages around it, calls it, and stops. `python run.py`"""

import tempfile
from pathlib import Path

from net import example

from shardserve import server
from shardserve.client import Client
from shardserve.export import export

HERE = Path(__file__).resolve().parent
GRPC = "unix:{folder}/grpc.sock"

TEXTS = ["Where is my parcel", "I want my money back for these shoes", "   ", "The invoice is wrong"]


def main():
    model, args, options = example()
    with tempfile.TemporaryDirectory() as folder:
        servable = Path(folder) / "text_score"
        servable.mkdir()
        (servable / "servable_config.py").write_text((HERE / "text_score" / "servable_config.py").read_text())
        # A version is a folder named by its number; it holds the model's files.
        export(model, args, name="text_score", out=servable / "1", **options)
        server.start_servables(server.ServableStartConfig(folder, "text_score", num_parallel_workers=2))
        address = GRPC.format(folder=folder)
        server.start_grpc_server(address)
        with Client(address, "text_score", "classify") as client:
            for text, answer in zip(TEXTS, client.infer([{"text": text} for text in TEXTS]), strict=True):
                print(f"{text!r}: {answer}")
        server.stop()
    print("stopped")


if __name__ == "__main__":
    main()
