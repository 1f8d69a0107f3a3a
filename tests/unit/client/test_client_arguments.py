"""Arguments of clients and of calls that are wrong."""

import asyncio

import pytest

from shardserve.client import AsyncClient, Client, SSLConfig, status
from shardserve.errors import ConfigError

from .harness import X


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", ":5500", "localhost:x", "localhost:0", "localhost:70000", "localhost:-1", "unix:", ""),
        *("http://localhost:5500", "local host:5500", "[]:5500", "localhost:5500 ", "localhost:٥٥", 5500, None, b"a:1"),
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match=r"^address: .* is not host:port or unix:path$"):
        Client(address, "echo", "predict")


WRONG_ARGUMENTS = [
    (("", "predict"), {}, "servable_name='' is not a name"),
    (("echo", ""), {}, "method_name='' is not a name"),
    ((None, "predict"), {}, "servable_name=None is not a name"),
    (("echo", b"predict"), {}, "method_name=b'predict' is not a name"),
    (("\ud800", "predict"), {}, "servable_name='.ud800'"),
    *(
        (("echo", "predict", version), {}, f"version_number={version!r} is not an integer from 0 .* to {2**64 - 1}$")
        for version in (-1, "1", 2**64, 1.0, None, True)
    ),
    (("echo", "predict"), {"ssl_config": {"custom_ca": "x"}}, "ssl_config is a shardserve.client.SSLConfig, got dict"),
]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(("arguments", "options", "text"), WRONG_ARGUMENTS)
def test_arguments_that_are_wrong_are_named(kind, arguments, options, text):
    async def run():
        with pytest.raises(ConfigError, match=f"^{text}"):
            kind("127.0.0.1:5500", *arguments, **options)

    asyncio.run(run())


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), -float("inf"), "1", True])
def test_timeouts_that_are_none(timeout):
    text = f"^timeout={timeout!r} is not a positive number of seconds"

    async def run():
        async with AsyncClient("127.0.0.1:1", "echo", "predict") as client:
            with pytest.raises(ConfigError, match=text):
                await client.infer(X, timeout=timeout)

    with Client("127.0.0.1:1", "echo", "predict") as client:
        for call in (client.infer, client.infer_async):
            with pytest.raises(ConfigError, match=text):
                call(X, timeout=timeout)
    with pytest.raises(ConfigError, match=text):
        status("127.0.0.1:1", timeout=timeout)
    asyncio.run(run())


def test_a_name_that_can_not_be_sent():
    with Client("127.0.0.1:1", "echo", "predict") as client:
        assert client.infer([X, {"\ud800": 1}])["error"].startswith("instance 1: a name that can't be UTF-8")


def test_tls_files():
    with pytest.raises(ConfigError, match="both certificate and private_key"):
        SSLConfig(certificate="cert.pem")
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem: No such file"):
        Client("localhost:1", "echo", "predict", ssl_config=SSLConfig(custom_ca="/nowhere/ca.pem"))


def test_tls_files_that_are_something_else(tmp_path):
    """gRPC would take them, and never say which one is wrong."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    key.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for config, said in [
        (SSLConfig(custom_ca=str(key)), f"TLS file {key}: is no PEM file with a line -----BEGIN CERTIFICATE-----"),
        (
            SSLConfig(str(certificate), str(certificate)),
            f"TLS file {certificate}: is no PEM file with a line -----BEGIN PRIVATE KEY-----",
        ),
        (SSLConfig(str(certificate), str(key)), f"TLS files {certificate} and {key}: "),
        (SSLConfig(custom_ca=str(certificate)), f"TLS file {certificate}: "),
    ]:
        with pytest.raises(ConfigError) as raised:
            Client("localhost:1", "echo", "predict", ssl_config=config)
        assert str(raised.value).startswith(said)
