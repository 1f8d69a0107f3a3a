"""Clients, REST and the gRPC front end's side services, against a whole server that gives back what it was sent."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time

import grpc
import httpx
import ml_dtypes
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import Up
from torch.export import Dim

from shardserve.client import AsyncClient, Client
from shardserve.export import export

SERVABLE = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=1, stage_size=1)


def same(x):
    return x


def first(instances):
    return [(x, str(getattr(x, "dtype", type(x).__name__))) for (x,) in instances]


@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)


@register.register_method(output_names=["y"])
def echo(x):
    return register.add_stage(same, x, outputs_count=1)


@register.register_method(output_names=["y", "dtype"])
def describe(x):
    return register.add_stage(first, x, outputs_count=2, batch_size=0)
"""

NUMBERS = {
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SHAPES = [(), (1,), (0,), (5,), (2, 0, 3), (2, 3, 4)]
TEXTS = ["", "häuser", b"", b"\0\xff", np.array(["a", "ñ", ""]), np.array([[b"a"], [b"\xff\0b"]], object)]


def array(name, shape):
    """Bits of all kinds, NaN among the floats."""
    dtype = NUMBERS[name]
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(1).integers(0, 2 if name == "bool" else 256, size, np.uint8)
    return raw.view(dtype).reshape(shape)


ARRAYS = [array(name, shape) for name in NUMBERS for shape in SHAPES]


def check_same(sent, back):
    if isinstance(sent, str | bytes):
        assert back == sent
    elif sent.dtype.kind in "UO":
        assert (back.shape, back.tolist()) == (sent.shape, sent.tolist())
    else:
        assert (back.dtype, back.shape, back.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


class Double(torch.nn.Module):
    """x float32 [batch, 4] → float32 [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.two = torch.nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        return x * self.two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    (folder / "net").mkdir()
    (folder / "net" / "servable_config.py").write_text(SERVABLE)
    shapes = {"x": {0: Dim("batch", min=1, max=8)}}
    model_dir = folder / "model"
    export(Double(), (torch.ones(2, 4),), name="net", out=model_dir, dynamic_shapes=shapes, output_names=["y"])
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with Up(folder, folder / "model", "net") as server:
        yield server
        assert server.stop() == 0


def post(served, method, instances):
    reply = httpx.post(f"http://{served.rest}/model/net:{method}", json={"instances": instances}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["instances"]


def test_every_dtype_over_grpc(served):
    values = [*ARRAYS, *TEXTS]
    with Client(served.grpc, "net", "echo", raise_errors=True) as client:
        answers = client.infer([{"x": value} for value in values], timeout=60)
        for value, answer in zip(values, answers, strict=True):
            check_same(value, answer["y"])
        for number, dtype in [(3, np.int64), (-(2**63), np.int64), (0.5, np.float64), (True, np.bool_)]:
            [answer] = client.infer({"x": number}, timeout=60)
            assert (answer["y"].dtype, answer["y"].tolist()) == (dtype, [number])
    with Client(served.grpc, "net", "describe", raise_errors=True) as client:
        answers = client.infer([{"x": value} for value in ARRAYS], timeout=60)
        assert [answer["dtype"] for answer in answers] == [value.dtype.name for value in ARRAYS]


def test_every_dtype_with_the_async_client(served):
    async def run():
        async with AsyncClient(served.grpc, "net", "echo", raise_errors=True) as client:
            answers = await asyncio.gather(*(client.infer({"x": value}, timeout=60) for value in [*ARRAYS, *TEXTS]))
        for value, [answer] in zip([*ARRAYS, *TEXTS], answers, strict=True):
            check_same(value, answer["y"])

    asyncio.run(run())


@pytest.mark.parametrize("name", list(NUMBERS))
def test_every_dtype_over_rest_as_base64(served, name):
    other = {"float16": "fp16", "float32": "fp32", "float64": "fp64"}
    for known in {name, other.get(name, name)}:
        values = [np.ones(shape, NUMBERS[name]) for shape in SHAPES]
        sent = [
            {"x": {"b64": base64.b64encode(value.tobytes()).decode(), "type": known, "shape": list(value.shape)}}
            for value in values
        ]
        for value, answer in zip(values, post(served, "describe", sent), strict=True):
            assert answer == {
                "y": value.astype(np.float64).astype(bool if name == "bool" else float).tolist(),
                "dtype": name,
            }


@pytest.mark.parametrize(
    ("sent", "back", "dtype"),
    [
        (3, [3], "int32"),
        (2.5, [2.5], "float32"),
        (True, [True], "bool"),
        ([1, 2], [1, 2], "int32"),
        ([[1, 2.5], [3, 4]], [[1, 2.5], [3, 4]], "float32"),
        ([[False], [True]], [[False], [True]], "bool"),
        ([], [], "float32"),
        ("häuser", "häuser", "str"),
        (["a", "b"], ["a", "b"], "object"),
        ({"b64": "/wA="}, {"b64": "/wA=", "type": "bytes"}, "bytes"),
        ({"b64": "w7E=", "type": "str"}, "ñ", "str"),
    ],
)
def test_json_values_over_rest(served, sent, back, dtype):
    assert post(served, "describe", {"x": sent}) == [{"y": back, "dtype": dtype}]


def test_the_signature_decides_over_rest_and_is_checked_over_grpc(served):
    assert post(served, "predict", {"x": [1, 2, 3, 4]}) == [{"y": [2, 4, 6, 8]}]
    with Client(served.grpc, "net", "predict") as client:
        good = np.ones(4, np.float32)
        first, wrong, last = client.infer([{"x": good}, {"x": good.astype(np.int32)}, {"x": good * 2}], timeout=60)
        assert (first["y"].tolist(), last["y"].tolist()) == ([2] * 4, [4] * 4)
        assert wrong == {"error": "instance 1: input 'x' must have dtype float32, got int32"}
        [unnamed, wrong] = client.infer([{"z": good}, {"x": good[:3]}], timeout=60)
        assert unnamed["error"].startswith("instance 0: missing 'x' and unknown 'z'")
        assert wrong == {"error": "instance 1: input 'x' must have size 4 at axis 0, got 3"}


WITHOUT_TORCH = """
import sys


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoTorch())
import asyncio
import ml_dtypes
import numpy as np
from shardserve.client import AsyncClient, Client, SSLConfig, status

address = sys.argv[1]
for dtype in (np.float32, ml_dtypes.bfloat16):
    with Client(address, "net", "echo", raise_errors=True) as client:
        [answer] = client.infer({"x": np.ones((2, 3), dtype)}, timeout=60)
        assert answer["y"].dtype == dtype and answer["y"].shape == (2, 3)
        assert client.infer_async([{"x": "a"}, {"x": b"b"}]).result() == [{"y": "a"}, {"y": b"b"}]


async def other():
    async with AsyncClient(address, "net", "echo", raise_errors=True) as client:
        assert (await client.infer({"x": 3}))[0]["y"] == 3


asyncio.run(other())
assert status(address)["servables"][0]["state"] == "ready"
assert "torch" not in sys.modules
"""


def test_a_client_where_torch_is_not_installed(served):
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, served.grpc], check=True, timeout=60)


def test_health_of_the_servable_and_reflection(served):
    with grpc.insecure_channel(served.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "net", "mindspore.serving.proto.MSService"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        symbol = "mindspore.serving.proto.MSService"
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
        ]
        listed, found = reflection.ServerReflectionInfo(iter(requests), timeout=60)
        names = {service.name for service in listed.list_services_response.service}
        assert {"mindspore.serving.proto.MSService", "grpc.health.v1.Health", "shardserve.v1.Admin"} <= names
        assert found.file_descriptor_response.file_descriptor_proto


def test_rest_paths_that_are_none(served):
    base = f"http://{served.rest}"
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("HEAD", "/nothing", 404),
        ("GET", "/model/net:predict", 405),
        ("POST", "/healthz", 405),
        ("POST", "/model/nobody:predict", 404),
    ]:
        reply = httpx.request(method, base + path, timeout=60)
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/json"
        assert method == "HEAD" or list(reply.json()) == ["error_msg"]
    assert httpx.get(f"{base}/healthz", timeout=60).json() == {"ready": True, "servables": {"net:1": "ready"}}


def test_the_commands_against_a_whole_server(served, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "shardserve.cli", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    np.save(tmp_path / "x.npy", np.ones(4, np.float32))
    done = command("infer", served.grpc, "net", "predict", "--input", "x=x.npy")
    assert (done.returncode, done.stdout) == (0, "y: float32 [4]\n[2. 2. 2. 2.]\n")
    done = command("status", served.grpc, "--json")
    assert done.returncode == 0
    [servable] = json.loads(done.stdout)["servables"]
    assert [servable[key] for key in ("name", "version", "state", "rank_size")] == ["net", 1, "ready", 1]
    [replica] = servable["replicas"]
    assert (replica["state"], replica["restarts"], replica["dropped"]) == ("serving", 0, 0)
    assert [rank["state"] for rank in replica["ranks"]] == ["serving"]
    done = command("status", served.grpc)
    assert done.stdout.startswith("net version 1: ready\n")


def test_a_unix_socket_as_front_end(folder, tmp_path_factory):
    address = f"unix:{tmp_path_factory.mktemp('unix')}/grpc.sock"
    with Up(folder, folder / "model", "net", "--grpc-address", address) as server:
        server.grpc = address
        with server.client(raise_errors=True) as client:
            assert client.infer({"x": np.ones(4, np.float32)}, timeout=60)[0]["y"].tolist() == [2] * 4
        assert server.replica()["state"] == "serving"
        assert server.stop() == 0


def test_a_client_finds_a_killed_front_end_again(folder):
    with Up(folder, folder / "model", "net") as server, server.client() as client:
        x = {"x": np.ones(4, np.float32)}
        assert isinstance(client.infer(x, timeout=60), list)
        [main] = server.of("shardserve.main ")
        os.kill(main, signal.SIGKILL)
        began = time.monotonic()
        while isinstance(client.infer(x, timeout=60), dict):
            assert time.monotonic() - began < 60
        assert server.of("shardserve.main ") != [main]
        assert server.stop() == 0
