"""Servables that are not distributed: what start_servables refuses, and a server with several of them."""

import re
import subprocess

import psutil
import pytest
from agent.shards import write_shards

from shardserve.errors import ConfigError
from shardserve.server import ServableStartConfig, start_servables

from .scripts import LOCAL, SERVABLE, Script, write_servable


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"servable_name": ""}, "servable_name='' is not the name of a servable's folder"),
        ({"servable_name": "ü:z"}, "servable_name='ü:z' is not the name of a servable's folder: it has ':' in it"),
        ({"version_number": -1}, "version_number=-1 is not an integer from 0 to "),
        ({"num_parallel_workers": True}, "num_parallel_workers=True is not an integer of at least 0"),
        ({"device_ids": []}, "device_ids=[] are not different device numbers"),
        ({"device_ids": [0, 0]}, "device_ids=[0, 0] are not different device numbers"),
        ({"device_ids": "0"}, "device_ids='0' are not different device numbers"),
        ({"device_type": "ascend"}, "device_type='ascend' is none of None, 'cpu', 'cuda', 'gpu'"),
        ({"device_type": 1}, "device_type=1 is no name"),
    ],
)
def test_wrong_config(options, said):
    with pytest.raises(ConfigError, match=re.escape(f"ServableStartConfig: {said}")):
        ServableStartConfig(**{"servable_directory": ".", "servable_name": "net", **options})


def test_devices_and_kinds():
    assert ServableStartConfig(".", "net").devices == (0,)
    assert ServableStartConfig(".", "net", 3, device_type="GPU").devices == (3,)
    assert ServableStartConfig(".", "net", [1, 2]).devices == (1, 2)


def test_the_latest_version_is_taken(tmp_path):
    (tmp_path / "net" / "9").mkdir(parents=True)
    (tmp_path / "net" / "10").mkdir()
    (tmp_path / "net" / "x11").mkdir()
    (tmp_path / "net" / "12").write_text("")
    assert ServableStartConfig(str(tmp_path), "net").options().version_number == 10
    assert ServableStartConfig(str(tmp_path), "net", version_number=9).options().version_number == 9
    with pytest.raises(ConfigError, match="has no version; a version is a folder named by its number"):
        ServableStartConfig(str(tmp_path), "other").options()


def test_what_is_no_config_or_comes_twice(tmp_path):
    with pytest.raises(ConfigError, match="is neither a ServableStartConfig nor a list of them"):
        start_servables([])
    with pytest.raises(ConfigError, match="is neither a ServableStartConfig nor a list of them"):
        start_servables(["net"])
    config = ServableStartConfig(str(tmp_path), "net", version_number=1)
    with pytest.raises(ConfigError, match="servable 'net' version 1 is given twice"):
        start_servables([config, config])


def test_several_servables_in_one_server_and_what_they_are_refused_with(tmp_path):
    for name in ("net", "other", "unknown"):
        write_servable(tmp_path, LOCAL, name=name)
    write_servable(tmp_path, LOCAL.replace('"shardserve"', '"MindIR"'), name="mindir")
    write_servable(tmp_path, SERVABLE, name="distributed")
    for folder in ("net/1", "net/2", "other/1"):
        write_shards(tmp_path / "shards" / folder, tensor_parallel=1)
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "shards" / folder / "device0").rename(tmp_path / folder)
    for name in ("unknown", "mindir", "distributed"):
        (tmp_path / name / "1").mkdir()
    text = f"""
        import numpy as np
        from shardserve.client import Client, status
        from shardserve.errors import ShardserveError

        def start(*names, **options):
            configs = [server.ServableStartConfig({str(tmp_path)!r}, name, **options) for name in names]
            try:
                server.start_servables(configs)
                print("started", *names, flush=True)
            except ShardserveError as error:
                print(type(error).__name__, error, flush=True)

        address = "unix:{tmp_path}/grpc.sock"
        server.start_grpc_server(address)
        start("net", "other", device_ids=[0, 1])
        start("net")
        start("net", version_number=1)
        start("unknown")
        start("mindir")
        start("distributed")
        for name, version in (("net", 0), ("net", 1), ("other", 1)):
            with Client(address, name, "predict", version, raise_errors=True) as client:
                [answer] = client.infer({{"x": np.ones(3, np.float32)}}, timeout=30)
                print(name, answer["y"].tolist(), flush=True)
        for servable in status(address)["servables"]:
            print(servable["name"], servable["version"], servable["state"], len(servable["replicas"]), flush=True)
        server.stop()
    """
    with Script(tmp_path, text) as script:
        assert script.line() == "started net other"
        assert script.line() == "ConfigError servable 'net' version 2 is started already"
        assert script.line() == "started net"
        missing = script.line()
        assert missing.startswith("ConfigError declare_model of servable 'unknown': there is no file ")
        assert missing.endswith("unknown/1/net.graph.json")
        assert "model_format='MindIR' is not supported; export the model with" in script.line()
        wrong = script.line()
        assert "'distributed' is distributed (declare_servable): start it with distributed.start_servable" in wrong
        assert [script.line() for _ in range(3)] == [f"{name} [1.0, 1.0, 1.0]" for name in ("net", "net", "other")]
        assert sorted(script.line() for _ in range(3)) == ["net 1 ready 1", "net 2 ready 2", "other 1 ready 2"]
        code, stderr = script.end()
        assert code == 0, stderr


def test_of_several_servables_that_fail_none_leaves_its_agents(tmp_path):
    for name in ("net", "other"):
        write_servable(tmp_path, LOCAL, name=name)
        (tmp_path / name / "1").mkdir()
    text = f"""
        import sys
        configs = [server.ServableStartConfig({str(tmp_path)!r}, name) for name in ("net", "other")]
        try:
            server.start_servables(configs)
        except Exception as error:
            print(error, flush=True)
        sys.stdin.read()
        server.stop()
    """
    with Script(tmp_path, text, stdin=subprocess.PIPE) as script:
        assert "servable 'net': there is no file" in script.line()
        servers = [child for child in script.children() if "shardserve.agent.fork_server" in child.cmdline()]
        assert not psutil.wait_procs(servers, timeout=30)[1]
        assert script.end() == (0, "")


def test_a_shard_that_can_not_be_loaded_ends_the_script(tmp_path):
    write_servable(tmp_path, LOCAL)
    (tmp_path / "net" / "1").mkdir()
    (tmp_path / "net" / "1" / "net.graph.json").write_text("{}")
    with Script(tmp_path, f"server.start_servables(server.ServableStartConfig({str(tmp_path)!r}, 'net'))") as script:
        code, stderr = script.end()
        assert code == 1
        assert "ShardError" in stderr
        assert "net/1/group_config.json: No such file or directory" in stderr


def test_a_local_servable_is_not_started_as_a_distributed_one(tmp_path, free_port):
    write_servable(tmp_path, LOCAL)
    text = f"distributed.start_servable('.', 'net', 'ranks.json', distributed_address='127.0.0.1:{free_port}')"
    with Script(tmp_path, text) as script:
        code, stderr = script.end()
        assert code == 1
        assert "'net' is not distributed (declare_model): start it with server.start_servables" in stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("['a', ['b']]", None),
        ("[['a', 'b'], ['c']]", "model_files: the ranks have different numbers of subgraphs: 2, 1"),
        ("[['a'], []]", "is not a list of paths"),
        ("[['a', 3]]", "is not a list of paths"),
        ("[['a', 'b']], ['c']", "group_config_files has 1 subgraphs a rank, model_files 2"),
    ],
)
def test_subgraphs_of_the_ranks(tmp_path, files, said):
    with Script(tmp_path, f"distributed.startup_agents('127.0.0.1:6200', {files})") as script:
        code, stderr = script.end()
        assert code == 1
        assert (said or "model_files: there is no file ") in stderr
