"""What is wrong when servers and agents start: each is refused with what was wrong, and good requests go on.

One server of two replicas, each a "host" of its own (127.0.0.1 and 127.0.0.2), answers all the time; the agents of the
second replica come with what is wrong, and in the end with what is right. Its paths are all relative to the scripts'
folder, and the scripts run in another.
"""

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from driver import DONE, Driver
from ports import free_ports
from serving import Processes, Up, write_servable
from torch.export import Dim

from shardserve.client import Client, status
from shardserve.export import export
from shardserve.worker.rank_table import make_rank_table

HOSTS = ("127.0.0.1", "127.0.0.2")


def write_model(out, pipeline_parallel=2):
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
    shapes = {"input": {0: Dim("batch", min=1, max=8)}}
    options = {"dynamic_shapes": shapes, "input_names": ["x"], "output_names": ["y"]}
    export(model, (torch.ones(2, 4),), name="net", out=out, pipeline_parallel=pipeline_parallel, **options)
    return model


def write_secret(path, text):
    path.write_text(text)
    path.chmod(0o600)


class Scene:
    """folder: the scripts', with all that they name. elsewhere: where they run."""

    def __init__(self, folder, elsewhere, processes):
        self.folder, self.processes, self.elsewhere = folder, processes, elsewhere
        self.model = write_model(folder / "model")
        write_model(folder / "another")
        write_model(folder / "whole", pipeline_parallel=1)
        write_servable(folder, "net", "rank_size=2, stage_size=2", "x", "y")
        self.write_table("ranks.json", make_rank_table([(host, range(2)) for host in HOSTS]))
        write_secret(folder / "secret", "a long and random secret")
        write_secret(folder / "wrong", "another secret")
        ports = free_ports(6)
        self.grpc, self.distributed = (f"127.0.0.1:{port}" for port in ports[:2])
        self.start_ports = ports[2], ports[4]

    def write_table(self, name, table):
        (self.folder / name).write_text(json.dumps(table))
        return name

    def driver(self, name):
        return Driver(self.processes, self.folder, name, self.elsewhere)

    def servable(self, **changes):
        options = {
            "servable_directory": ".",
            "servable_name": "net",
            "rank_table_json_file": "ranks.json",
            "distributed_address": self.distributed,
            "join_secret_file": "secret",
        }
        return {**options, **changes}

    def agents(self, host=1, **changes):
        """The arguments of the agents of a host."""
        options = {
            "distributed_address": self.distributed,
            "model_files": [f"model/device{rank}/net.graph.json" for rank in range(2)],
            "agent_start_port": self.start_ports[host],
            "agent_ip": HOSTS[host],
            "rank_start": 2 * host,
            "join_secret_file": "secret",
        }
        return {**options, **changes}

    def copy(self, name, of="model"):
        """A copy of a model's folder."""
        shutil.copytree(self.folder / of, self.folder / name)
        return self.folder / name

    def check(self):
        x = np.arange(4, dtype=np.float32)
        with Client(self.grpc, "net", "predict", raise_errors=True) as client:
            [answer] = client.infer({"x": x}, timeout=60)
        with torch.inference_mode():
            np.testing.assert_allclose(answer["y"], self.model(torch.from_numpy(x)).numpy(), atol=1e-5)

    def states(self):
        return [replica["state"] for replica in status(self.grpc)["servables"][0]["replicas"]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    with Processes() as processes:
        scene = Scene(tmp_path_factory.mktemp("scripts"), tmp_path_factory.mktemp("elsewhere"), processes)
        scene.server, scene.first, scene.second = (scene.driver(name) for name in ("server", "first", "second"))
        assert scene.server.ask("start_grpc_server", address=scene.grpc) == DONE
        scene.server.begin("start_servable", **scene.servable())
        for host, driver in enumerate((scene.first, scene.second)):
            driver.begin("startup_agents", **scene.agents(host))
        assert [driver.answer() for driver in (scene.first, scene.second, scene.server)] == [DONE] * 3
        scene.check()
        yield scene
        assert [driver.end() for driver in (scene.server, scene.first, scene.second)] == [0] * 3
        processes.wait_all_ended(20)


@pytest.fixture
def vacant(scene):
    """The second replica's agents have gone, and those that come in the test are gone after it."""
    assert scene.second.ask("stop") == DONE
    scene.check()
    yield scene
    scene.check()
    assert scene.second.ask("stop") == DONE


def refused(scene, **changes):
    """What the agents of the second host are told that start so; the server goes on."""
    said = scene.second.ask("startup_agents", **scene.agents(**changes))
    scene.check()
    return said


def graphs(folder, ranks=(0, 1)):
    return [f"{folder}/device{rank}/net.graph.json" for rank in ranks]


# Agents that come to a server whose ranks are all taken.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_files": graphs("model") + graphs("model")}, "ConfigError: 4 model_files for 2 ranks: "),
        ({"model_files": graphs("model", [0])}, "ConfigError: 1 model_files for 2 ranks: "),
        ({"rank_start": 4}, "ConfigError: rank_start=4: the rank table has ranks 0 to 3"),
        (
            {"rank_start": 3},
            "ConfigError: rank_start=3: the rank table has rank 3 on host 127.0.0.2, whose first rank ",
        ),
        ({}, r"JoinRefused: rank 2 is already kept by another startup_agents \(pid [0-9]+\)"),
        ({"join_secret_file": "wrong"}, r"JoinRefused: the Worker at 127.0.0.1:[0-9]+: wrong join secret"),
        ({"join_secret_file": None}, "JoinRefused: came without a join secret: give join_secret_file"),
    ],
    ids=["more than ranks", "fewer", "no such rank", "not the first", "two for one rank", "wrong secret", "no secret"],
)
def test_agents_that_are_one_too_many_or_not_let_in(scene, changes, said):
    stranger = scene.driver("stranger")
    assert re.match(said, stranger.ask("startup_agents", **scene.agents(**changes)))
    scene.check()
    assert scene.states() == ["serving", "serving"]
    assert stranger.end() == 0


# Agents that come with wrong files, where nobody has their ranks.


def test_shard_files_that_are_missing(vacant):
    folder = vacant.copy("missing")
    for name, kind in (("net.graph.json", "ConfigError"), ("group_config.json", "ShardError")):
        file = folder / "device1" / name
        kept = file.read_bytes()
        file.unlink()
        said = refused(vacant, model_files=graphs("missing"))
        assert said.startswith(f"{kind}: ")
        assert str(file) in said
        file.write_bytes(kept)
    weights = folder / "device1" / "weights.safetensors"
    weights.unlink()
    assert refused(vacant, model_files=graphs("missing")) == f"ShardError: {weights}: No such file or directory"


@pytest.mark.parametrize("name", ["net.graph.json", "weights.safetensors", "group_config.json"])
def test_shard_files_that_are_truncated(vacant, name):
    file = vacant.copy(f"truncated {name}") / "device1" / name
    file.write_bytes(file.read_bytes()[:-5])
    said = refused(vacant, model_files=graphs(f"truncated {name}"))
    why = {
        "net.graph.json": "its sha256 is not the one in group_config.json",
        "weights.safetensors": f"has {file.stat().st_size} bytes, its header speaks of {file.stat().st_size + 5}",
        "group_config.json": "not JSON: ",
    }
    assert said.startswith(f"ShardError: {file}: {why[name]}")


def test_shards_of_another_rank(vacant):
    config = vacant.folder / "model" / "device1" / "group_config.json"
    said = refused(vacant, model_files=graphs("model", [1, 0]))
    assert said == f"ConfigError: {config}: is the config of device1; rank 2 needs that of device0"


def test_shards_of_another_export(vacant):
    said = refused(vacant, model_files=graphs("another"))
    assert re.match(r"ShardError: rank [23]: its shard is of export \S+, that of rank 0 of export ", said)


def test_a_shard_of_another_layout(vacant):
    said = refused(vacant, model_files=graphs("whole", [0]) + graphs("model", [1]))
    assert said == ("ShardError: rank 2: its shard is of rank_size=1, stage_size=1; servable 'net' declares 2, 2")


@pytest.mark.parametrize("name", ["net.graph.json", "group_config.json"])
def test_shards_of_another_format_version(vacant, name):
    folder = vacant.copy(f"format of {name}")
    file, config_file = folder / "device1" / name, folder / "device1" / "group_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 9}))
    config = json.loads(config_file.read_text())
    digest = hashlib.sha256((folder / "device1" / "net.graph.json").read_bytes()).hexdigest()
    config_file.write_text(json.dumps({**config, "graph_sha256": digest}))
    said = refused(vacant, model_files=graphs(f"format of {name}"))
    assert said.startswith(f"ShardError: {file}: format_version is 9; this release reads 1 and 2; ")


def test_a_port_that_an_agent_needs_is_in_use(vacant):
    with socket.socket() as busy:
        # Only agents that a previous pipeline stage connects to listen.
        where = (HOSTS[1], vacant.start_ports[1] + 1)
        busy.bind(where)
        busy.listen()
        said = refused(vacant)
    assert said == f"StartError: rank 3: agent_start_port gives it {where[0]}:{where[1]}: the port is in use"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has CUDA devices")
def test_a_cuda_device_that_is_not_there_is_never_the_cpu_instead(vacant):
    said = refused(vacant, device_type="cuda")
    assert re.match(r"StartError: rank [23]: device cuda:[01]: CUDA is not available on this host", said)


def test_a_relative_path_that_is_right_from_another_directory_only(vacant):
    shutil.copytree(vacant.folder / "model", vacant.elsewhere / "here")
    said = refused(vacant, model_files=graphs("here"))
    assert said == f"ConfigError: model_files: there is no file {vacant.folder}/here/device0/net.graph.json"


def test_after_all_of_that_the_right_agents_are_taken(vacant):
    assert vacant.second.ask("startup_agents", **vacant.agents()) == DONE
    # They are registered; forming their group is what comes next.
    deadline = time.monotonic() + 60
    while (states := vacant.states()) != ["serving", "serving"]:
        assert time.monotonic() < deadline, states


# Servers that are started with what is wrong.


def wrong_tables():
    """Two of each layout; tests/unit/worker/test_rank_table.py has every kind of every field."""
    path = "$.server_list[0].device[1]"
    yield "server_list", "rank_id", None, f"{path}.rank_id is missing"
    yield "server_list", "rank_id", "7", f"{path}.rank_id is 7, but there are 2 ranks, and no rank_id 1"
    path = "$.group_list[0].instance_list[1]"
    yield "group_list", "rank_id", "01", f'{path}.rank_id is "01", not a canonical decimal'
    yield "group_list", "rank_id", "0", f"{path}.rank_id 0 is also that of "


def table_with(layout, field, value):
    table = make_rank_table([(HOSTS[0], range(2))], layout)
    second = (
        table["server_list"][0]["device"][1] if layout == "server_list" else table["group_list"][0]["instance_list"][1]
    )
    if value is None:
        del second[field]
    else:
        second[field] = value
    return table


def test_up_with_a_wrong_table_and_then_with_the_right_one(scene, capfd):
    folder, table = scene.folder, make_rank_table([(HOSTS[0], range(2))])
    right = scene.write_table("up.json", table)
    table["server_list"][0]["device"][0]["device_id"] = 0
    wrong = scene.write_table("up_wrong.json", table)
    refused = Up(folder, folder / "model", "net", "--rank-table", str(folder / wrong))
    assert refused.start(*refused.command).wait(60) == 1
    refused.wait_all_ended(20)
    refused.__exit__()
    with Up(folder, folder / "model", "net", "--rank-table", str(folder / right)) as up:
        with up.client(raise_errors=True) as client:
            client.infer({"x": np.zeros(4, np.float32)}, timeout=60)
        assert up.stop() == 0
    said = f"rank table {folder}/up_wrong.json: $.server_list[0].device[0].device_id is 0, not a string"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("model, x,", "modl, x,", "name 'modl' is not defined"),
        ("stage_size=2", "stage_size=1", "its shard is of rank_size=2, stage_size=2; servable 'net' declares 2, 1"),
        ("model, x,", "model, x, x,", "method 'predict' gives the model 2 inputs; its shards take 1"),
        ("", "", "weights.safetensors: No such file or directory"),
    ],
    ids=["config", "layout", "inputs", "weights"],
)
def test_up_says_what_is_wrong_in_one_line(scene, tmp_path, was, becomes, said):
    shutil.copytree(scene.folder / "model", tmp_path / "model")
    config = write_servable(tmp_path, "net", "rank_size=2, stage_size=2", "x", "y") / "net" / "servable_config.py"
    config.write_text(config.read_text().replace(was, becomes))
    if not was:
        (tmp_path / "model" / "device1" / "weights.safetensors").unlink()
    # On a slow machine a start that waits says so, in a line more.
    up = Up(tmp_path, tmp_path / "model", "net", SHARDSERVE_WAITING_NOTICE="600")
    command = [sys.executable, *map(str, up.command)]
    ended = subprocess.run(command, env=up.environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("shardserve up: ")
    assert said in line


def test_servers_that_are_started_wrongly_and_then_rightly(scene):
    """Its port, its name and its processes are free again each time; a script that fails so goes on as it likes."""
    grpc, distributed, first, last = (free_ports(1)[0], free_ports(1)[0], *free_ports(2))
    server, agents = scene.driver("other_server"), scene.driver("other_agents")
    address = f"127.0.0.1:{distributed}"
    assert server.ask("start_grpc_server", address=f"127.0.0.1:{grpc}") == DONE

    def wrong(**changes):
        return server.ask("start_servable", **scene.servable(**{"distributed_address": address, **changes}))

    for layout, field, value, said in wrong_tables():
        name = scene.write_table("wrong.json", table_with(layout, field, value))
        assert wrong(rank_table_json_file=name).startswith(
            f"RankTableError: rank table {scene.folder}/wrong.json: {said}"
        )
    name = scene.write_table("three.json", make_rank_table([(HOSTS[0], range(3))]))
    assert "three.json: $ has 3 ranks; the servable declares rank_size=2, stage_size=2" in wrong(
        rank_table_json_file=name
    )
    assert wrong(rank_table_json_file="none.json").endswith("/none.json: No such file or directory")
    assert "servable 'nothing': there is no file" in wrong(servable_name="nothing")
    assert wrong(join_secret_file="none").endswith("/none: No such file or directory")
    # That of the other server, and that of a front end.
    assert wrong(distributed_address=scene.distributed).endswith(f"{scene.distributed}: the port is in use")
    assert "the port is in use" in server.ask("start_grpc_server", address=scene.grpc)
    assert "the port is in use" in server.ask("start_restful_server", address=scene.grpc)
    said = "0 of 4 agents came within wait_agents_time_in_seconds=0.2; missing: rank 0, 1, 2, 3"
    assert wrong(wait_agents_time_in_seconds=0.2) == f"StartError: servable 'net': {said}"

    name = scene.write_table("right.json", make_rank_table([(HOSTS[0], range(2))], "group_list"))
    right = scene.servable(distributed_address=address, rank_table_json_file=name)
    server.begin("start_servable", **right)
    files = {"distributed_address": address, "agent_start_port": first, "agent_ip": None, "rank_start": None}
    # Agents that don't fit end alone, also where they are the first: the start waits for others.
    said = agents.ask(
        "startup_agents", **scene.agents(**files, model_files=graphs("whole", [0]) + graphs("model", [1]))
    )
    assert said == "ShardError: rank 0: its shard is of rank_size=1, stage_size=1; servable 'net' declares 2, 2"
    assert agents.ask("startup_agents", **scene.agents(**files)) == DONE
    assert server.answer() == DONE
    assert last == first + 1
    with Client(f"127.0.0.1:{grpc}", "net", "predict", raise_errors=True) as client:
        [answer] = client.infer({"x": np.zeros(4, np.float32)}, timeout=60)
    assert answer["y"].shape == (4,)
    scene.check()
    assert [driver.end() for driver in (server, agents)] == [0, 0]
