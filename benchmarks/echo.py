"""The floor of every front end: a bare server that decodes and encodes the same messages and does nothing else.

`python -m benchmarks.echo sync|aio|rest` serves on a free port of 127.0.0.1, prints it, ends with its standard input.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from concurrent import futures
from typing import Any

import grpc
import msgspec
import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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


async def rest_answer(request: Request) -> Response:
    """Reads the input as an array, as the front end does, and replies with as many rows of 16 numbers."""
    instance = msgspec.json.decode(await request.body())["instances"]
    x = np.array(instance["x"], np.float32)
    y = Y[: len(x)].tolist()
    return Response(msgspec.json.encode({"instances": [{"y": y}]}), media_type="application/json")


async def serve_rest() -> None:
    app = Starlette(routes=[Route("/model/matmul:predict", rest_answer, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    if sys.argv[1] == "sync":
        serve_sync()
    elif sys.argv[1] == "aio":
        asyncio.run(serve_aio())
    else:
        uvloop.run(serve_rest())
