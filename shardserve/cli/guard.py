"""The options of `serve` and `agents` that say who may join: join secret and TLS of the distributed address."""

from __future__ import annotations

import argparse

from shardserve.errors import ConfigError
from shardserve.server import SSLConfig


def add_guard_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "who may join",
        "beyond loopback the server and all of its agents need the same secret, certificates of one CA, or both",
    )
    group.add_argument(
        "--join-secret-file",
        metavar="FILE",
        help="a secret that only the owner can read (or SHARDSERVE_JOIN_SECRET_FILE)",
    )
    add_tls_arguments(group, "", "this host's certificate: the distributed address and stage links speak TLS")
    group.add_argument("--insecure", action="store_true", help="let whoever reaches the address join")


def add_tls_arguments(group: argparse._ArgumentGroup, prefix: str, what: str) -> None:
    group.add_argument(f"--{prefix}certificate", metavar="FILE", help=what)
    group.add_argument(f"--{prefix}private-key", metavar="FILE", help="the key of that certificate")
    group.add_argument(f"--{prefix}custom-ca", metavar="FILE", help="the CA that the other side's certificate is of")
    group.add_argument(f"--{prefix}verify-client", action="store_true", help="ask the other side for its certificate")


def ssl_config(args: argparse.Namespace, prefix: str = "") -> SSLConfig | None:
    """What the TLS options with this prefix say; None without any. ConfigError if they don't go together."""
    names = ("certificate", "private_key", "custom_ca", "verify_client")
    certificate, private_key, custom_ca, verify_client = (
        getattr(args, prefix.replace("-", "_") + name) for name in names
    )
    if not any((certificate, private_key, custom_ca, verify_client)):
        return None
    if certificate is None or private_key is None:
        raise ConfigError(f"--{prefix}certificate and --{prefix}private-key: TLS needs both")
    return SSLConfig(certificate, private_key, custom_ca, verify_client)
