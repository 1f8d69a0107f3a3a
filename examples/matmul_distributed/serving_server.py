"""The server: waits for the agents of all 8 ranks, then answers over gRPC and REST until a signal."""

import os

from shardserve import server
from shardserve.server import distributed


def start():
    servable_dir = os.path.dirname(os.path.realpath(__file__))
    distributed.start_servable(
        servable_dir,
        "matmul",
        rank_table_json_file="rank_table_8pcs.json",
        version_number=1,
        distributed_address="127.0.0.1:6200",
        wait_agents_time_in_seconds=0,
    )
    server.start_grpc_server("127.0.0.1:5500")
    server.start_restful_server("127.0.0.1:1500")


if __name__ == "__main__":
    start()
