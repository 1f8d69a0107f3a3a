"""The launch API of a serving script: the server's front ends, distributed servables, and what declares them."""

from shardserve.server import distributed, register
from shardserve.server.front import SSLConfig, start_grpc_server, start_restful_server
from shardserve.server.runtime import stop

__all__ = ["SSLConfig", "distributed", "register", "start_grpc_server", "start_restful_server", "stop"]
