"""The TLS files of an order, checked before anything listens."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from shardserve.errors import StartError
from shardserve.wire.messages.launch import TLSFiles


def check(files: TLSFiles) -> None:
    """StartError names the file that is missing or isn't what it should be."""
    if files.verify_client and files.custom_ca is None:
        raise StartError(
            "verify_client needs custom_ca, the certificate that clients' certificates are checked against"
        )
    for path in (files.certificate, files.private_key, files.custom_ca):
        if path is not None:
            _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.private_key)
    except ssl.SSLError as error:
        raise StartError(f"TLS files {files.certificate} and {files.private_key}: {error.reason or error}") from error
    if files.custom_ca is not None:
        try:
            context.load_verify_locations(files.custom_ca)
        except ssl.SSLError as error:
            raise StartError(f"TLS file {files.custom_ca}: {error.reason or error}") from error


def grpc_credentials(files: TLSFiles) -> grpc.ServerCredentials:
    """What gRPC takes."""
    check(files)
    ca = _read(files.custom_ca) if files.custom_ca is not None else None
    chain = (_read(files.private_key), _read(files.certificate))
    return grpc.ssl_server_credentials([chain], ca, files.verify_client)


def uvicorn_options(files: TLSFiles) -> dict[str, Any]:
    """What uvicorn's Config takes."""
    check(files)
    return {
        "ssl_certfile": files.certificate,
        "ssl_keyfile": files.private_key,
        "ssl_ca_certs": files.custom_ca,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if files.verify_client else ssl.CERT_NONE,
    }


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"TLS file {path}: {error.strerror}") from error
