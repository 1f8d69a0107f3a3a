"""The options of commands that run a server, or a part of one."""

from __future__ import annotations

import argparse

from shardserve.cli.options import values
from shardserve.cli.options.guard import add_tls_arguments

GRPC_ADDRESS, REST_ADDRESS, DISTRIBUTED_ADDRESS = "127.0.0.1:5500", "127.0.0.1:1500", "127.0.0.1:6200"


def add_servable_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=values.path, help="holds NAME/servable_config.py")
    parser.add_argument("--servable", metavar="NAME", help="the servable (default: the only one in DIR)")
    parser.add_argument(
        "--version",
        type=values.count,
        metavar="N",
        help="the servable's version (default: 1; if it is not distributed, the latest that has a folder)",
    )
    parser.add_argument(
        "--num-parallel-workers",
        type=values.count,
        default=1,
        metavar="N",
        help="processes for the servable's Python stages (default %(default)s)",
    )


def add_front_arguments(parser: argparse.ArgumentParser) -> None:
    front = parser.add_argument_group("what clients talk to")
    front.add_argument(
        "--grpc-address",
        type=values.grpc_address,
        default=GRPC_ADDRESS,
        metavar="ADDRESS",
        help="ip:port or unix:path (default %(default)s)",
    )
    front.add_argument(
        "--rest-address", type=values.address, default=REST_ADDRESS, metavar="IP:PORT", help="default %(default)s"
    )
    front.add_argument(
        "--max-msg-mb-size",
        type=values.megabytes,
        default=100,
        metavar="N",
        help="the largest request, in MB, 1 to 512 (default %(default)s)",
    )
    add_tls_arguments(front, "front-", "the server's certificate: gRPC and REST speak TLS")


def add_distributed_address(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--distributed-address",
        type=values.address,
        default=DISTRIBUTED_ADDRESS,
        metavar="IP:PORT",
        help=f"{what} (default %(default)s)",
    )


def add_agent_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--agent-start-port",
        type=values.port,
        default=7000,
        metavar="N",
        help="agent i of this host listens on port N + i (default %(default)s)",
    )
    add_device_type(parser)


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--devices",
        type=values.device_ids,
        metavar="LIST",
        help="of a servable that is not distributed, which gets a replica on each: ids with commas and ranges, 0,2-4 "
        "(default: 0)",
    )


def add_device_type(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device-type", choices=("cpu", "cuda"), help="what the model runs on (default: cpu)")
