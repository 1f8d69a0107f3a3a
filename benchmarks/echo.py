"""The floor of every front end: a bare gRPC server that decodes and encodes the same messages and does nothing else.

`python -m benchmarks.echo sync|aio` serves on a free port of 127.0.0.1, prints it, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceServicer, add_MSServiceServicer_to_server

Y = np.full((128, 16), -48, np.float32)


def answer(request: pb.PredictRequest) -> pb.PredictReply:
    """Reads the input (48 KB) as an array, and replies with 8 KB."""
    tensor = request.instances[0].items["x"]
    np.frombuffer(tensor.data, np.float32).reshape(tensor.shape.dims)
    y = pb.Tensor(shape=pb.TensorShape(dims=Y.shape), dtype=pb.MS_FLOAT32, data=Y.tobytes())
    return pb.PredictReply(servable_spec=request.servable_spec, instances=[pb.Instance(items={"y": y})])


class SyncEcho(MSServiceServicer):
    def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictReply:
        return answer(request)


class AioEcho(MSServiceServicer):
    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictReply:
        return answer(request)


def serve_sync() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_MSServiceServicer_to_server(SyncEcho(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0).wait()


async def serve_aio() -> None:
    server = grpc.aio.server()
    add_MSServiceServicer_to_server(AioEcho(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    if sys.argv[1] == "sync":
        serve_sync()
    else:
        asyncio.run(serve_aio())
