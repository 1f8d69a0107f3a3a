"""The options of commands that talk to a running server: its address, how long to wait, and TLS."""

from __future__ import annotations

import argparse

from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.client import SSLConfig, channel
from shardserve.errors import ConfigError


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    """ADDRESS, of every command that talks to a server."""
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        type=values.server_address,
        help="the server's gRPC address: host:port or unix:path",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
        channel.seconds(value)
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a positive number of seconds") from None
    return value


def add_connection_arguments(parser: argparse.ArgumentParser, timeout: float | None = 10.0) -> None:
    """--timeout and the TLS files, for every command that talks to a server."""
    shown = f" (default {timeout:g})" if timeout is not None else " (default: none)"
    parser.add_argument("--timeout", type=_seconds, default=timeout, metavar="S", help=f"seconds to wait{shown}")
    parser.add_argument(
        "--custom-ca", metavar="FILE", help="connect with TLS, check the server against this CA (default: no TLS)"
    )
    parser.add_argument("--certificate", metavar="FILE", help="this client's certificate, for TLS (default: none)")
    parser.add_argument("--private-key", metavar="FILE", help="the key of that certificate (default: none)")


def tls_config(args: argparse.Namespace) -> SSLConfig | None:
    """What the TLS arguments say; None without any. WrongUsage if they don't go together."""
    if args.custom_ca is None and args.certificate is None and args.private_key is None:
        return None
    if (args.certificate is None) != (args.private_key is None):
        raise WrongUsage("--certificate and --private-key: give both or neither")
    return SSLConfig(args.certificate, args.private_key, args.custom_ca)
