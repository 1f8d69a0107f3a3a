"""The TLS files of an order, checked before anything listens."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from shardserve.wire.messages.launch import TLSFiles
from shardserve.wire.tls import check_files, read_file


def grpc_credentials(files: TLSFiles) -> grpc.ServerCredentials:
    """What gRPC takes."""
    check_files(files)
    ca = read_file(files.custom_ca) if files.custom_ca is not None else None
    chain = (read_file(files.private_key), read_file(files.certificate))
    return grpc.ssl_server_credentials([chain], ca, files.verify_client)


def uvicorn_options(files: TLSFiles) -> dict[str, Any]:
    """What uvicorn's Config takes."""
    check_files(files)
    return {
        "ssl_certfile": files.certificate,
        "ssl_keyfile": files.private_key,
        "ssl_ca_certs": files.custom_ca,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if files.verify_client else ssl.CERT_NONE,
    }
