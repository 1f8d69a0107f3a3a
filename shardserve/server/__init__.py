"""The launch API of a serving script: the front ends, servables (distributed or not), and what declares them."""

from shardserve.server import distributed, register
from shardserve.server.front import SSLConfig, start_grpc_server, start_restful_server
from shardserve.server.runtime import stop
from shardserve.server.servables import ServableStartConfig, start_servables

__all__ = [
    "SSLConfig",
    "ServableStartConfig",
    "distributed",
    "register",
    "start_grpc_server",
    "start_restful_server",
    "start_servables",
    "stop",
]
