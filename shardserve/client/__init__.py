"""For users of a running server: `Client`, `AsyncClient`, their `SSLConfig`, `status` and `timeline`. Needs no torch.

from shardserve.client import Client

with Client("localhost:5500", "matmul", "predict") as client:
    print(client.infer({"x": np.ones((128, 96), np.float32)}))
"""

import shardserve.client.quiet  # noqa: F401 -- before anything else imports grpc
from shardserve.client.aio import AsyncClient
from shardserve.client.channel import SSLConfig
from shardserve.client.status import status
from shardserve.client.sync import Client, InferFuture
from shardserve.client.timeline import timeline

__all__ = ["AsyncClient", "Client", "InferFuture", "SSLConfig", "status", "timeline"]
