"""`shardserve rank-table`: writes a rank table."""

from __future__ import annotations

import argparse
import ipaddress
import json

from shardserve.cli.options import values
from shardserve.errors import ConfigError
from shardserve.worker.rank_table import make_rank_table, parse_rank_table

EXAMPLE = """examples:
  shardserve rank-table --host 127.0.0.1:8
  shardserve rank-table --host 10.0.0.1:4 --host 10.0.0.2:0,2-4 --out rank_table.json

DEVICES is a number of devices (8: devices 0 to 7) or a list of device ids with commas and ranges (0,2-4; 3-3 for one).
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "rank-table",
        help="write a rank table",
        description="Writes a rank table: ranks are counted through the devices of the hosts, in the order given.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        type=_host,
        metavar="IP:DEVICES",
        help="a host's address and its devices; once per host",
    )
    parser.add_argument(
        "--layout",
        choices=("server_list", "group_list"),
        default="server_list",
        help="which of the two known forms (default %(default)s)",
    )
    parser.add_argument("--out", type=values.path, metavar="FILE", help="where to (default: standard output)")
    parser.set_defaults(run=run)


def _host(text: str) -> tuple[str, list[int]]:
    address, _, devices = text.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")
    if not address or not devices:
        raise argparse.ArgumentTypeError(f"{text!r} isn't IP:DEVICES")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {address!r} isn't an IP address") from None
    try:
        if devices.isascii() and devices.isdecimal():
            return address, list(range(values.device_count(devices)))
        return address, values.device_ids(devices)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def run(args: argparse.Namespace) -> int:
    table = make_rank_table(args.host, args.layout)
    # Finds what is given twice.
    parse_rank_table(table)
    text = json.dumps(table, indent=2) + "\n"
    if args.out is None:
        print(text, end="")
        return 0
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.out}: {error.strerror}") from error
    return 0
