"""`make bench-peers`: the same tensor-parallel matmul on ours and on Triton with a hand-written backend.

Both get protobuf requests that are built once, through generated stubs, from the same loops: p50 at one client, then
requests a second at 8 and 32 clients. `--triton ADDRESS MODEL` names a running Triton that serves fp32 [128, 96] @
full(0.5, [96, 16]), negated, on 2 ranks; how to write and start it is Triton's.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from benchmarks.load import Call, check_matmul, interleaved_p50, interleaved_throughput, matmul_request, predict
from benchmarks.models import matmul
from benchmarks.report import Row, machine, report
from benchmarks.servers import up

ROUNDS = 5
CALLS = 100
SECONDS = 3.0


def triton(address: str, model: str) -> Call:
    """A call on a channel of its own, its request built once."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    x = np.ones((128, 96), np.float32)
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
    request = service_pb2.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[x.tobytes()])
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))

    def call() -> npt.NDArray[Any]:
        reply = stub.ModelInfer(request)
        return np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(reply.outputs[0].shape)

    return call


def measure(folder: Path, address: str, model: str) -> list[Row]:
    matmul(folder, 2)
    request = matmul_request()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(up(folder, "matmul"))
        makes = {"triton": lambda: triton(address, model), "ours": lambda: predict(server.grpc, request)}
        calls = {name: make() for name, make in makes.items()}
        for call in calls.values():
            check_matmul(call)
        p50 = interleaved_p50(calls, ROUNDS, CALLS)
        name = "p50 of a matmul call, tp 2; peer: Triton, tp 2 by hand"
        rows = [Row(name, "ms", p50["triton"] * 1e3, p50["ours"] * 1e3, at_most=0.5)]
        for clients in (8, 32):
            rates = interleaved_throughput(makes, ROUNDS, clients, SECONDS)
            rows.append(Row(f"{clients} clients", "req/s", rates["triton"], rates["ours"], at_least=2.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The same tensor-parallel matmul on ours and on Triton.")
    parser.add_argument("--triton", nargs=2, metavar=("ADDRESS", "MODEL"), required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report("peers", measure(Path(name), *options.triton), machine())


if __name__ == "__main__":
    main()
