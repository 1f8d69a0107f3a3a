"""The examples of every --help, run to the letter by a shell, on hosts of their own for the ports that they name."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hosts import Hosts, need_hosts
from serving import EXAMPLES, Processes, copy_matmul_example, export_transformer, load_module, write_servable

from shardserve.cli.commands import parser
from shardserve.export import Plan, export

pytestmark = pytest.mark.timeout(150)
SUBPARSERS = next(action for action in parser()._actions if action.dest == "command")
# Two hosts, with the addresses that the examples name.
ADDRESSES = ("10.0.0.1", "10.0.0.2")


def examples():
    """Of each command its examples, as one line each, without what explains them."""
    found = {}
    for command, subparser in SUBPARSERS.choices.items():
        text = subparser.epilog.replace("\\\n", " ")
        lines = re.findall(r"^  (shardserve .*)$", text, re.MULTILINE)
        found[command] = [" ".join(line.partition("#")[0].split()) for line in lines]
    return found


ALL = examples()


class Shell(Processes):
    """Runs command lines on the hosts."""

    def __init__(self, hosts):
        super().__init__()
        self._hosts = hosts
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def begin(self, line, cwd, host=0):
        # exec: a signal is for the command, not for the shell.
        words = [*self._hosts.command(host), "bash", "-c", f"exec {line}"]
        process = subprocess.Popen(words, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def ready(self, *processes):
        for process in processes:
            readable, _, _ = select.select([process.stdout], [], [], 90)
            assert readable
            assert process.stdout.readline().startswith("ready: ")

    def output(self, line, cwd):
        words = [*self._hosts.command(0), "bash", "-c", f"set -o pipefail; {line}"]
        done = subprocess.run(words, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, line
        return done.stdout

    def stop(self, *processes):
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(60) == 0
        self.wait_all_ended(20)


@pytest.fixture(scope="module")
def shell():
    need_hosts()
    with Hosts(2) as hosts:
        for host, address in enumerate(ADDRESSES):
            hosts.add_address(host, address)
        with Shell(hosts) as shell:
            yield shell


def test_each_command_has_examples_and_all_are_run_here():
    text = Path(__file__).read_text()
    for command, lines in ALL.items():
        assert lines
        for number in range(len(lines)):
            assert f'ALL["{command}"][{number}]' in text


def test_export_inspect_and_rank_table(shell, tmp_path):
    folder = tmp_path / "examples" / "transformer"
    shutil.copytree(EXAMPLES / "transformer", folder, ignore=shutil.ignore_patterns("model", "__pycache__"))
    assert "max abs error: " in shell.output(ALL["export"][0], folder)
    assert "nothing written" in shell.output(ALL["export"][1], folder)
    assert "4 ranks, 2 pipeline stages" in shell.output(ALL["inspect"][0], tmp_path)
    assert "wrote " in shell.output(ALL["inspect"][1], tmp_path)
    assert "batch = 8, length = 64" in (tmp_path / "shards.html").read_text()
    assert '"rank_id": "7"' in shell.output(ALL["rank-table"][0], tmp_path)
    assert shell.output(ALL["rank-table"][1], tmp_path) == ""
    assert '"server_id": "10.0.0.2"' in (tmp_path / "rank_table.json").read_text()


def test_up_status_infer_bench_and_trace(shell, tmp_path):
    copy_matmul_example(tmp_path / "examples")
    script = tmp_path / "examples" / "matmul_distributed" / "export_model" / "export_model.py"
    subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL)
    up = shell.begin(ALL["up"][0], tmp_path)
    shell.ready(up)
    np.save(tmp_path / "x.npy", np.ones((128, 96), np.float32))
    assert "matmul version 1: ready" in shell.output(ALL["status"][0], tmp_path)
    if shutil.which("jq") is not None:
        assert shell.output(ALL["status"][1], tmp_path) == '"ready"\n'
    assert "y: float32 [128, 16]" in shell.output(ALL["infer"][0], tmp_path)
    assert (np.load(tmp_path / "results" / "y.npy") == -48).all()
    assert len(shell.output(ALL["bench"][0], tmp_path).splitlines()) == 3
    assert len(shell.output(ALL["bench"][1], tmp_path).splitlines()) == 4
    assert "<svg" in (tmp_path / "matmul.svg").read_text()
    assert (tmp_path / "matmul.json").exists()
    assert "trace.json: steps: " in shell.output(ALL["trace"][0], tmp_path)
    (tmp_path / "trace.json").unlink()
    shell.output(ALL["trace"][1], tmp_path)
    assert "traceEvents" in (tmp_path / "trace.json").read_text()
    shell.stop(up)


def test_up_with_subgraphs(shell, tmp_path):
    shutil.copytree(EXAMPLES / "subgraphs" / "words", tmp_path / "words")
    net = load_module(EXAMPLES / "subgraphs" / "net.py")
    for name, make in (("read", net.read), ("step", net.step)):
        model, args, options = make()
        plan = Plan.from_dict(net.PLAN)
        export(model, args, name=name, out=tmp_path / "model" / name, tensor_parallel=2, plan=plan, **options)
    up = shell.begin(ALL["up"][1], tmp_path)
    shell.ready(up)
    shell.stop(up)


def test_up_with_devices(shell, tmp_path):
    shutil.copytree(EXAMPLES / "replicas" / "mlp", tmp_path / "mlp")
    model, args, options = load_module(EXAMPLES / "replicas" / "run.py").make()
    export(model, args, name="mlp", out=tmp_path / "mlp" / "1", **options)
    up = shell.begin(ALL["up"][2], tmp_path)
    shell.ready(up)
    shell.stop(up)


def test_serve_and_agents(shell, tmp_path):
    write_servable(tmp_path, "net", "rank_size=4, stage_size=2", "ids, attention_mask", "logits")
    export_transformer(tmp_path / "model", 2, 2)
    for graph in tmp_path.glob("model/device*/transformer.graph.json"):
        rename(graph)
    table = "shardserve rank-table --host 10.0.0.1:2 --host 10.0.0.2:2 --out ranks.json"
    shell.output(table, tmp_path)
    (tmp_path / "join.secret").write_text("a long and random secret")
    (tmp_path / "join.secret").chmod(0o600)
    serve = shell.begin(ALL["serve"][0], tmp_path)
    other = shell.begin(ALL["agents"][0], tmp_path, host=1)
    own = shell.begin(ALL["agents"][0].replace("device2", "device0").replace("device3", "device1"), tmp_path)
    shell.ready(serve, other, own)
    serve.send_signal(signal.SIGTERM)
    for process in (serve, other, own):
        assert process.wait(60) == 0
    shell.wait_all_ended(20)


def rename(graph):
    """As if it had been exported with --name net."""
    graph.rename(graph.with_name("net.graph.json"))
    config = graph.with_name("group_config.json")
    config.write_text(config.read_text().replace('"transformer', '"net'))
