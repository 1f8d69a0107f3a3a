import asyncio
import shutil
import ssl
import subprocess

import httpx
import pytest
from main_harness import Launcher, Worker, attached
from ports import free_port

from shardserve.client import AsyncClient, SSLConfig
from shardserve.wire.messages import launch

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl, which makes the certificates, is missing"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CA, and a certificate of it for 127.0.0.1 that server and client both use."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-subj", "/CN=test ca", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("req", *key[:3], "-subj", "/CN=server", "-keyout", "key.pem", "-out", "request.pem")
    sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    openssl("x509", "-req", "-in", "request.pem", *sign, "-out", "cert.pem")
    return {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}


@pytest.mark.parametrize("verify_client", [False, True])
def test_both_front_ends_speak_tls(files, verify_client):
    tls = launch.TLSFiles(files["cert"], files["key"], files["ca"] if verify_client else None, verify_client)
    own = SSLConfig(files["cert"], files["key"], files["ca"])
    context = ssl.create_default_context(cafile=files["ca"])
    strange = ssl.create_default_context(cafile=files["ca"])
    context.load_cert_chain(files["cert"], files["key"])

    async def run():
        async with Launcher() as launcher:
            grpc_address, rest_address = await launcher.grpc(tls=tls), await launcher.rest(tls=tls)
            async with attached(launcher, Worker()):
                for config, works in [
                    (own, True),
                    (SSLConfig(custom_ca=files["ca"]), not verify_client),
                    (None, False),
                ]:
                    async with AsyncClient(grpc_address, "echo", "predict", ssl_config=config) as client:
                        answer = await client.infer({"x": 1}, timeout=10)
                    assert isinstance(answer, list) == works, answer
                    if config is None:
                        assert answer["error"].endswith("does the server want TLS (ssl_config)?")
                plain = await launcher.grpc()
                async with AsyncClient(plain, "echo", "predict", ssl_config=own) as client:
                    assert (await client.infer({"x": 1}, timeout=10))["error"].endswith("the server speaks no TLS")
                for verify, works in [(context, True), (strange, not verify_client)]:
                    async with httpx.AsyncClient(verify=verify) as http:
                        post = http.post(f"https://{rest_address}/model/echo:predict", json={"instances": {"x": 1}})
                        if works:
                            assert (await post).json() == {"instances": [{"x": [1]}]}
                        else:
                            with pytest.raises(httpx.TransportError):
                                await post

    asyncio.run(run())


@pytest.mark.parametrize("kind", [launch.StartGrpc, launch.StartRest])
def test_files_that_are_wrong_are_named(files, kind, tmp_path):
    (tmp_path / "empty.pem").touch()
    empty = str(tmp_path / "empty.pem")
    wrong = [
        (("/nowhere/cert.pem", files["key"], None, False), "/nowhere/cert.pem: No such file"),
        ((files["cert"], files["key"], "/nowhere/ca.pem", True), "/nowhere/ca.pem: No such file"),
        ((files["cert"], empty, None, False), empty),
        ((files["cert"], files["key"], empty, True), empty),
        ((files["cert"], files["key"], None, True), "verify_client needs custom_ca"),
    ]

    async def run():
        async with Launcher() as launcher:
            for fields, text in wrong:
                refused = await launcher.give(kind, f"127.0.0.1:{free_port()}", 100, launch.TLSFiles(*fields))
                assert refused.error == "StartError", refused
                assert text in refused.message

    asyncio.run(run())
