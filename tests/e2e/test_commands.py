"""`up`, `serve` and `agents` as users call them: subgraphs, servables that are not distributed, TLS, progress."""

import json
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from ports import free_ports
from serving import EXAMPLES, Processes, load_module, write_servable
from terminal import OnTerminal

from shardserve.client import Client, SSLConfig, status
from shardserve.export import Plan, export

# The command itself, whose folder relative paths must not be taken from.
SCRIPT = Path(sys.executable).with_name("shardserve")


class Served(Processes):
    """Commands that serve, from the folder `cwd`, on free ports; gRPC on a Unix socket there."""

    def __init__(self, cwd, **environment):
        super().__init__(**environment)
        self.cwd = cwd
        rest, distributed, agents = free_ports(3 + 8)[:3]
        self.rest = f"127.0.0.1:{rest}"
        self.grpc = f"unix:{cwd}/grpc.sock"
        self.fronts = ("--grpc-address", "unix:grpc.sock", "--rest-address", self.rest)
        self.distributed = ("--distributed-address", f"127.0.0.1:{distributed}")
        self.agents = (*self.distributed, "--agent-start-port", agents)

    def run(self, command, *arguments):
        """Returns when it is ready."""
        process = self.start(SCRIPT, command, *arguments, cwd=self.cwd)
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"{line!r}, exit code {process.wait(10)}"
        return process

    def stop(self, *processes):
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        self.wait_all_ended(20)


@pytest.fixture(scope="module")
def subgraphs(tmp_path_factory):
    """The example of two subgraphs as `up` takes it."""
    folder = tmp_path_factory.mktemp("subgraphs")
    shutil.copytree(EXAMPLES / "subgraphs" / "words", folder / "words")
    net = load_module(EXAMPLES / "subgraphs" / "net.py")
    for name, make in (("read", net.read), ("step", net.step)):
        model, args, options = make()
        plan = Plan.from_dict(net.PLAN)
        export(model, args, name=name, out=folder / "model" / name, tensor_parallel=2, plan=plan, **options)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The example of replicas as `up` takes it."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copytree(EXAMPLES / "replicas" / "mlp", folder / "mlp")
    model, args, options = load_module(EXAMPLES / "replicas" / "run.py").make()
    export(model, args, name="mlp", out=folder / "mlp" / "1", **options)
    return folder


def generate(address):
    with Client(address, "words", "generate", raise_errors=True) as client:
        [answer] = client.infer([{"ids": np.arange(6), "count": 5}], timeout=60)
    return answer["words"].tolist()


def predict(address, **options):
    with Client(address, "mlp", "predict", **options) as client:
        return client.infer([{"x": np.ones(64, np.float32)}] * 3, timeout=60)


def test_up_takes_a_model_dir_for_each_subgraph(subgraphs):
    with Served(subgraphs) as served:
        flags = (*served.fronts, *served.agents, "--num-parallel-workers", 2)
        up = served.run("up", ".", "--model-dir", "model/read", "--model-dir", "model/step", *flags)
        words = generate(served.grpc)
        assert len(words) == 5
        assert len(served.of("shardserve.worker.stages")) == 2
        # Plain integers reach a Python function as int32; the model takes int64.
        body = b'{"instances": {"ids": [0, 1, 2, 3, 4, 5], "count": 5}}'
        with urllib.request.urlopen(f"http://{served.rest}/model/words:generate", body, timeout=60) as reply:
            assert json.load(reply)["instances"] == [{"words": words}]
        served.stop(up)


def test_agents_take_the_files_of_each_subgraph_and_paths_are_from_the_current_folder(subgraphs):
    secret = subgraphs / "join.secret"
    secret.write_text("a long and random secret")
    secret.chmod(0o600)
    table = subprocess.run([SCRIPT, "rank-table", "--host", "127.0.0.1:2"], check=True, capture_output=True).stdout
    (subgraphs / "ranks.json").write_bytes(table)
    files = {name: [f"model/{name}/device{rank}/{name}.graph.json" for rank in (0, 1)] for name in ("read", "step")}
    configs = {name: [file.replace(f"{name}.graph", "group_config") for file in files[name]] for name in files}
    with Served(subgraphs, SHARDSERVE_JOIN_SECRET_FILE="join.secret") as served:
        subgraph = ("--subgraph", *files["step"])
        config = ("--group-config", *configs["read"], "--group-config", *configs["step"])
        joining = ("--join-secret-file", "join.secret")
        agents = served.start(SCRIPT, "agents", *files["read"], *subgraph, *config, *served.agents, cwd=subgraphs)
        serve = served.run("serve", ".", "--rank-table", "ranks.json", *joining, *served.fronts, *served.distributed)
        assert agents.stdout.readline().startswith("ready: 2 agents")
        assert len(generate(served.grpc)) == 5
        serve.terminate()
        assert serve.wait(60) == 0
        # The server told them to leave.
        assert agents.wait(60) == 0
        served.wait_all_ended(20)


def test_model_dirs_of_different_sizes(subgraphs, tmp_path):
    shutil.copytree(subgraphs / "words", tmp_path / "words")
    model, args, options = load_module(EXAMPLES / "replicas" / "run.py").make()
    export(model, args, name="mlp", out=tmp_path / "one", **options)
    command = [SCRIPT, "up", tmp_path, "--model-dir", subgraphs / "model" / "read", "--model-dir", tmp_path / "one"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"read has 2 ranks, {tmp_path}/one has 1" in done.stderr


@pytest.mark.parametrize("command", ["up", "serve"])
def test_a_servable_that_is_not_distributed(local, command):
    with Served(local) as served:
        process = served.run(command, ".", *served.fronts)
        assert len(predict(served.grpc)) == 3
        assert len(status(served.grpc)["servables"][0]["replicas"]) == 1
        served.stop(process)


def test_a_replica_on_each_device(local):
    with Served(local) as served:
        up = served.run("up", ".", "--devices", "0,2-3", *served.fronts)
        [servable] = status(served.grpc)["servables"]
        assert len(servable["replicas"]) == 3
        assert len(predict(served.grpc)) == 3
        served.stop(up)


def test_the_front_ends_limit_and_tls(local, tmp_path):
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.certificate("server", "127.0.0.1")
    with Served(local) as served:
        grpc = f"127.0.0.1:{free_ports(1)[0]}"
        tls = ("--front-certificate", certificate, "--front-private-key", key)
        fronts = ("--grpc-address", grpc, "--rest-address", served.rest, "--max-msg-mb-size", 1)
        up = served.run("up", ".", *fronts, *tls)
        config = SSLConfig(custom_ca=str(authority.custom_ca))
        assert len(predict(grpc, ssl_config=config)) == 3
        with Client(grpc, "mlp", "predict", ssl_config=config) as client:
            answer = client.infer({"x": np.ones(1 << 19, np.float32)}, timeout=60)
        assert "RESOURCE_EXHAUSTED" in answer["error"]
        context = ssl.create_default_context(cafile=str(authority.custom_ca))
        with urllib.request.urlopen(f"https://{served.rest}/healthz", context=context, timeout=60) as reply:
            assert reply.status == 200
        served.stop(up)


@pytest.mark.parametrize("command", ["up", "serve", "agents"])
def test_a_signal_before_it_is_ready_is_exit_code_130(subgraphs, command):
    with Served(subgraphs, SHARDSERVE_WAITING_NOTICE="0.1") as served:
        table = subgraphs / "alone.json"
        # Rank 1 is on a host that never comes.
        hosts = ("--host", "127.0.0.1:1", "--host", "192.0.2.1:1")
        subprocess.run([SCRIPT, "rank-table", *hosts, "--out", table], check=True)
        arguments = {
            "up": (".", "--model-dir", "model/read", *served.fronts, *served.agents),
            "serve": (".", "--rank-table", "alone.json", *served.fronts, *served.distributed),
            "agents": ("model/read/device0/read.graph.json", *served.agents),
        }[command]
        process = subprocess.Popen(
            [SCRIPT, command, *map(str, arguments)],
            cwd=subgraphs,
            env=served.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stderr.readline()
            assert " wait" in line, line
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert output == ""
        assert "Traceback" not in errors
        served.wait_all_ended(20)


def test_up_draws_how_many_agents_are_loaded_on_a_terminal(subgraphs):
    with Served(subgraphs) as served:
        flags = (*served.fronts, *served.agents)
        models = ("--model-dir", "model/read", "--model-dir", "model/step")
        with OnTerminal(("up", ".", *models, *flags), subgraphs, **served.environment) as up:
            line = up.process.stdout.readline()
            assert line.startswith("ready: ")
            assert " MB of weights loaded in " in line
            up.process.send_signal(signal.SIGTERM)
            assert up.process.wait(60) == 0
            drawn = up.read_to_end()
        assert "\rstarting the Worker: 0 of 1 |" in drawn
        assert "\rloading agents: 0 of 2 |" in drawn
        assert "\rloading agents: 2 of 2 |" in drawn
        assert not drawn.split("\r")[-2].strip()
        served.wait_all_ended(20)


def test_serve_and_agents_draw_what_they_wait_for(subgraphs):
    table = subprocess.run([SCRIPT, "rank-table", "--host", "127.0.0.1:2"], check=True, capture_output=True).stdout
    (subgraphs / "ranks.json").write_bytes(table)
    files = [f"model/read/device{rank}/read.graph.json" for rank in (0, 1)]
    steps = [file.replace("read", "step") for file in files]
    with Served(subgraphs, SHARDSERVE_WAITING_NOTICE="0.1") as served:
        serve = ("serve", ".", "--rank-table", "ranks.json", *served.fronts, *served.distributed)
        agents = ("agents", *files, "--subgraph", *steps, *served.agents)
        with OnTerminal(serve, subgraphs, **served.environment) as server:
            server.read_until("loading agents: 0 of 2 |")
            # A line of the log goes above the bar.
            server.read_until("waits for agents: 0 of 2 are there, missing ranks 0-1")
            with OnTerminal(agents, subgraphs, **served.environment) as host:
                host.read_until("loading agents: 0 of 2 |")
                host.read_until("loading agents: 2 of 2 |")
                assert host.process.stdout.readline().startswith("ready: ")
                assert server.process.stdout.readline().startswith("ready: ")
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(60) == 0
                assert host.process.wait(60) == 0
        served.wait_all_ended(20)


def test_piped_up_writes_no_control_characters(subgraphs):
    # On a slow machine a start that waits says so.
    with Served(subgraphs, SHARDSERVE_WAITING_NOTICE="600") as served:
        models = ("--model-dir", "model/read", "--model-dir", "model/step")
        command = [SCRIPT, "up", ".", *models, *map(str, (*served.fronts, *served.agents))]
        with subprocess.Popen(
            command, cwd=subgraphs, env=served.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as up:
            line = up.stdout.readline()
            up.send_signal(signal.SIGTERM)
            output, errors = up.communicate(timeout=60)
        assert line.startswith(b"ready: words of 2 ranks; gRPC on unix:")
        assert (output, errors) == (b"", b"")
        served.wait_all_ended(20)


def test_the_wrong_kind_is_an_error_that_names_the_option(local, subgraphs):
    with Served(local) as served:
        for folder, flags, said in (
            (
                local,
                ("--model-dir", subgraphs / "model" / "read"),
                "start it with server.start_servables (shardserve up --devices)",
            ),
            (subgraphs, ("--devices", "0"), "--devices is for a servable that is not distributed"),
        ):
            command = [SCRIPT, "up", folder, *flags, *served.fronts, *served.agents]
            done = subprocess.run(
                list(map(str, command)), cwd=local, env=served.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 1
            assert said in done.stderr
            assert "Traceback" not in done.stderr
        served.wait_all_ended(20)


def test_shards_of_other_ranks_than_the_servable_declares(subgraphs, tmp_path):
    """No table was given, so none is spoken of."""
    write_servable(tmp_path, "words", "rank_size=4, stage_size=1", "x", "y")
    with Served(tmp_path) as served:
        command = [SCRIPT, "up", tmp_path, "--model-dir", subgraphs / "model" / "read", *served.fronts, *served.agents]
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=served.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"the model in {subgraphs}/model/read has 2 ranks; the servable declares rank_size=4" in done.stderr
        assert "Traceback" not in done.stderr
        assert "shardserve up: " in done.stderr
        served.wait_all_ended(20)
