"""The options that say who may join (join secret, TLS of the distributed address), and those of the front ends' TLS."""

from __future__ import annotations

import argparse

from shardserve.cli.codes import WrongUsage
from shardserve.cli.options import values
from shardserve.server import SSLConfig
from shardserve.settings import Settings
from shardserve.wire.security import is_loopback
from shardserve.wire.sockets import parse_address


def add_guard_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "who may join",
        "beyond loopback the server and all of its agents need the same secret, certificates of one CA, or both",
    )
    group.add_argument(
        "--join-secret-file",
        type=values.path,
        metavar="FILE",
        help="a secret that only the owner can read (default: SHARDSERVE_JOIN_SECRET_FILE in the environment, or none)",
    )
    add_tls_arguments(group, "", "this host's certificate: the distributed address and stage links speak TLS")
    group.add_argument("--insecure", action="store_true", help="let whoever reaches the address join")


def add_tls_arguments(group: argparse._ArgumentGroup, prefix: str, what: str) -> None:
    for name, meaning in (
        ("certificate", f"{what}; PEM (default: no TLS)"),
        ("private-key", "the key of that certificate; PEM (default: no TLS)"),
        ("custom-ca", "the CA that the other side's certificate is of; PEM (default: the system's)"),
    ):
        group.add_argument(f"--{prefix}{name}", type=values.path, metavar="FILE", help=meaning)
    group.add_argument(f"--{prefix}verify-client", action="store_true", help="ask the other side for its certificate")


def join_secret_file(args: argparse.Namespace) -> str | None:
    """As given or by the environment, from the current directory."""
    file = args.join_secret_file or Settings.from_environment().join_secret_file
    return str(values.path(str(file))) if file else None


def check_guarded(args: argparse.Namespace) -> None:
    """WrongUsage if the distributed address is beyond loopback and nothing says who may join."""
    guarded = args.insecure or join_secret_file(args) is not None or ssl_config(args) is not None
    host = parse_address(args.distributed_address, "--distributed-address").host
    if not guarded and not is_loopback(host):
        raise WrongUsage(
            f"--distributed-address: {host} can be reached from other hosts: give --join-secret-file, or --certificate "
            "and --private-key, or --insecure if whoever reaches it may join"
        )


def ssl_config(args: argparse.Namespace, prefix: str = "") -> SSLConfig | None:
    """What the TLS options with this prefix say; None without any. WrongUsage if they don't go together."""
    begin = prefix.replace("-", "_")
    certificate, private_key, custom_ca = (
        getattr(args, begin + name) for name in ("certificate", "private_key", "custom_ca")
    )
    verify_client: bool = getattr(args, f"{begin}verify_client")
    if not any((certificate, private_key, custom_ca, verify_client)):
        return None
    if certificate is None or private_key is None:
        raise WrongUsage(f"--{prefix}certificate and --{prefix}private-key: TLS needs both")
    return SSLConfig(str(certificate), str(private_key), str(custom_ca) if custom_ca else None, verify_client)
