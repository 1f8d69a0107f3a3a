"""Servables that are not distributed: several models in one, Python stages over them, replicas that die."""

import os
import signal

import pytest
import torch
from serving import Processes
from torch.export import Dim

from shardserve.client import Client, status
from shardserve.export import export

SERVABLE = """
from shardserve.server import register

add = register.declare_model("add/device0/add.graph.json", "shardserve")
scale = register.declare_model(["scale/device0/scale.graph.json", "add/device0/add.graph.json"], "shardserve")


def each(instances):
    added = add.call(instances)
    for scaled, again in zip(scale.call(added), scale.call(added, subgraph=1)):
        yield scaled[0], again[0]


@register.register_method(output_names=["y"])
def chain(x):
    return register.add_stage(scale, register.add_stage(add, x, outputs_count=1), outputs_count=1)


@register.register_method(output_names=["scaled", "again"])
def calls(x):
    return register.add_stage(each, x, outputs_count=2, batch_size=0)


def too_far(x):
    return add.call(x, subgraph=1)


@register.register_method(output_names=["y"])
def beyond(x):
    return register.add_stage(too_far, x, outputs_count=1)
"""
SCRIPT = """
import sys
from shardserve import server

folder, address = sys.argv[1:]
server.start_grpc_server(address)
server.start_servables([server.ServableStartConfig(folder, "pair", [0, 1], num_parallel_workers=2)])
print("ready", flush=True)
"""


class Add(torch.nn.Module):
    def forward(self, x):
        return x + 1


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * 10


@pytest.fixture
def served(tmp_path):
    for name, model in (("add", Add()), ("scale", Scale())):
        shapes = {"x": {0: Dim("batch", min=1, max=8)}}
        out = tmp_path / "pair" / "1" / name
        export(model, (torch.ones(2, 3),), name=name, out=out, dynamic_shapes=shapes, output_names=["y"])
    (tmp_path / "pair" / "servable_config.py").write_text(SERVABLE)
    (tmp_path / "serve.py").write_text(SCRIPT)
    address = f"unix:{tmp_path}/grpc.sock"
    with Processes() as processes:
        process = processes.start(tmp_path / "serve.py", tmp_path, address)
        assert process.stdout.readline() == "ready\n"
        yield address, processes
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        processes.wait_all_ended(20)


def ask(address, method, count=5):
    with Client(address, "pair", method) as client:
        return client.infer([{"x": torch.full((3,), i, dtype=torch.float32).numpy()} for i in range(count)], timeout=60)


def test_models_subgraphs_and_replicas(served):
    address, processes = served
    assert [answer["y"][0] for answer in ask(address, "chain")] == [10, 20, 30, 40, 50]
    answers = ask(address, "calls")
    assert [(answer["scaled"][0], answer["again"][0]) for answer in answers] == [(10 * i, i + 1) for i in range(1, 6)]
    [answer] = ask(address, "beyond", 1)
    assert "method 'beyond', stage 'too_far': InvalidInput: subgraph=1: the model has 1, numbered from 0" in str(answer)
    assert len(processes.of("shardserve.worker.stages")) == 2
    [servable] = status(address)["servables"]
    assert servable["rank_size"] == 1
    pids = [replica["ranks"][0]["pid"] for replica in servable["replicas"]]
    assert len(set(pids)) == 2
    for victim in (*pids, *processes.of("shardserve.worker ")):
        os.kill(victim, signal.SIGKILL)
        assert [answer["y"][0] for answer in ask(address, "chain", 100)] == [10 * i for i in range(1, 101)]
