"""Every command: what its --help says, and exit code 2 for a wrong command line, 1 for what doesn't work."""

import argparse
import json

import pytest

from shardserve.cli import main
from shardserve.cli.commands import parser

COMMANDS = next(
    action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction)
)  # name → parser

EXPORT = ("export", "m:f", "--name", "m", "--out", "o")
AGENTS = ("agents", "a.json", "b.json")
BENCH = ("bench", "127.0.0.1:5500", "m", "p")
TRACE = ("trace", "127.0.0.1:5500", "--out", "t.json")

WRONG_USAGE = [
    ((), "COMMAND"),
    (("fly",), "'fly'"),
    *((((command, "--no-such-option")), "--no-such-option|required") for command in COMMANDS),
    (("export",), "SOURCE, --name"),
    ((*EXPORT, "--tp", "0"), "--tp: '0' isn't a number of 1 or more"),
    ((*EXPORT, "--tp", "x"), "--tp: 'x'"),
    ((*EXPORT, "--tp", "²"), "--tp: '²'"),
    ((*EXPORT, "--pp", "-1"), "--pp"),
    ((*EXPORT, "--pp", "1.5"), "--pp: '1.5'"),
    ((*EXPORT, "--atol", "-1"), "--atol"),
    ((*EXPORT, "--atol", "nan"), "--atol: 'nan'"),
    ((*EXPORT, "--rtol", "small"), "--rtol: 'small'"),
    (("inspect",), "DIR"),
    (("rank-table",), "--host"),
    (("rank-table", "--host", "10.0.0.1"), "--host: '10.0.0.1' isn't IP:DEVICES"),
    (("rank-table", "--host", "10.0.0.1:3-1"), "'3-1' is no device id"),
    (("rank-table", "--host", "10.0.0.1:1,1"), "'1,1' has a device twice"),
    (("rank-table", "--host", "10.0.0.1:2", "--layout", "list"), "--layout"),
    *(
        ((command, ".", *needed, option, value), said)
        for command, needed in (("up", ()), ("serve", ("--rank-table", "r.json")))
        for option, value, said in (
            ("--grpc-address", "5500", "--grpc-address: '5500' isn't ip:port with a port of 1 to 65535"),
            ("--grpc-address", "127.0.0.1:0", "--grpc-address: '127.0.0.1:0'"),
            ("--grpc-address", "unix:", "--grpc-address: 'unix:' has no path"),
            ("--rest-address", "unix:rest.sock", "--rest-address: 'unix:rest.sock'"),
            ("--rest-address", "127.0.0.1:65536", "--rest-address: '127.0.0.1:65536'"),
            ("--distributed-address", "here", "--distributed-address: 'here'"),
            ("--version", "0", "--version: '0'"),
            ("--version", "latest", "--version: 'latest'"),
            ("--num-parallel-workers", "0", "--num-parallel-workers: '0'"),
            ("--max-msg-mb-size", "0", "--max-msg-mb-size: '0' isn't a number of 1 to 512"),
            ("--max-msg-mb-size", "513", "--max-msg-mb-size: '513'"),
            ("--devices", "0-", "--devices: '0-' is no device id"),
            ("--devices", "1,0-2", "--devices: '1,0-2' has a device twice"),
            ("--device-type", "tpu", "--device-type"),
        )
    ),
    (("up", ".", "--agent-start-port", "0"), "--agent-start-port: '0' isn't a port"),
    (("serve", ".", "--rank-table", "r.json", "--wait-agents", "-1"), "--wait-agents"),
    (("serve", ".", "--rank-table", "r.json", "--wait-agents", "inf"), "--wait-agents: 'inf'"),
    (("agents",), "GRAPH"),
    ((*AGENTS, "--agent-start-port", "70000"), "--agent-start-port: '70000'"),
    ((*AGENTS, "--rank-start", "-1"), "--rank-start"),
    ((*AGENTS, "--rank-start", "2"), "--agent-ip and --rank-start: give both or neither"),
    ((*AGENTS, "--agent-ip", "127.0.0.1"), "--agent-ip and --rank-start: give both or neither"),
    ((*AGENTS, "--device-type", "tpu"), "--device-type"),
    ((*AGENTS, "--distributed-address", "127.0.0.1"), "--distributed-address: '127.0.0.1'"),
    ((*AGENTS, "--subgraph", "c.json"), "--subgraph: 1 files for 2 ranks"),
    ((*AGENTS, "--group-config", "c.json"), "--group-config: 1 files for 2 ranks"),
    ((*AGENTS, "--subgraph", "c", "d", "--group-config", "e", "f"), "--group-config: 1 times for 2 subgraphs"),
    ((*AGENTS, "--certificate", "cert.pem"), "--certificate and --private-key: TLS needs both"),
    ((*AGENTS, "--verify-client"), "--certificate and --private-key: TLS needs both"),
    *(
        (
            (*words, "--distributed-address", f"{address}:6200"),
            f"--distributed-address: {address} can be reached from "
            "other hosts: give --join-secret-file, or --certificate and --private-key, or --insecure",
        )
        for address in ("192.0.2.1", "0.0.0.0")
        for words in (AGENTS, ("up", ".", "--servable", "s"), ("serve", ".", "--servable", "s", "--rank-table", "r"))
    ),
    (("rank-table", "--host", "10.0.0.1:0"), "'0' isn't a number of devices, 1 to 65536"),
    (("rank-table", "--host", "10.0.0.1:99999999"), "'99999999' isn't a number of devices"),
    (("rank-table", "--host", f"10.0.0.1:0-{'9' * 30}"), "the highest device id is 65535|is no device id"),
    (("rank-table", "--host", "1.2.3:1"), "'1.2.3' isn't an IP address"),
    (("rank-table", "--host", "localhost:2"), "'localhost' isn't an IP address"),
    (("up", ".", "--devices", "0-99999999"), "the highest device id is 65535"),
    *(
        (words, "--certificate and --private-key: give both or neither")
        for words in (
            ("status", "127.0.0.1:1", "--certificate", "x"),
            ("infer", "127.0.0.1:1", "m", "p", "--private-key", "x"),
        )
    ),
    (("infer", "nope", "m", "p"), "'nope' isn't host:port with a port of 1 to 65535, and not unix:path"),
    (("status",), "ADDRESS"),
    (("status", "nonsense"), "'nonsense'"),
    (("infer", "127.0.0.1:5500", "m"), "METHOD"),
    (("infer", "127.0.0.1:5500", "m", "p", "--input", "x"), "--input: 'x'"),
    (("infer", "127.0.0.1:5500", "m", "p", "--version", "-1"), "--version"),
    (("infer", "127.0.0.1:5500", "m", "p", "--timeout", "0"), "--timeout: '0'"),
    (("bench", "127.0.0.1:5500", "m"), "METHOD"),
    ((*BENCH, "--input", "x"), "--input: 'x' isn't NAME=FILE.npy"),
    ((*BENCH, "--input", "x=a.npy", "--npz", "b.npz"), "--input and --npz: give one of them"),
    ((*BENCH, "--concurrency", "1,0"), "--concurrency: '0' isn't a number of 1 or more"),
    ((*BENCH, "--concurrency", "1,,2"), "--concurrency: ''"),
    ((*BENCH, "--concurrency", "2,1,2"), "--concurrency: '2,1,2' has a number twice"),
    ((*BENCH, "--seconds", "0"), "--seconds: '0' isn't more than 0"),
    ((*BENCH, "--seconds", "inf"), "--seconds: 'inf'"),
    ((*BENCH, "--warmup", "-1"), "--warmup: '-1'"),
    ((*BENCH, "--instances", "0"), "--instances: '0'"),
    ((*BENCH, "--plot", "plot.pdf"), "--plot: 'plot.pdf' ends neither with .svg nor with .png"),
    (("trace", "127.0.0.1:5500"), "--out"),
    ((*TRACE, "--seconds", "-1"), "--seconds: '-1'"),
    ((*TRACE, "--version", "x"), "--version: 'x'"),
    ((*TRACE, "--version", "1"), "--version: give --servable, too"),
]


def run(arguments, capsys):
    """Exit code, stdout, stderr."""
    try:
        code = main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    return (code, *capsys.readouterr())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current one: two servables, and one that is exported as not distributed in local/."""
    for name in ("one", "two", "local/mlp", "model-only/net", "sharded/net"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "servable_config.py").touch()
    (tmp_path / "local" / "mlp" / "1").mkdir()
    (tmp_path / "sharded" / "model").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_and_has_an_example(command, capsys):
    code, output, _ = run([command, "--help"], capsys)
    assert code == 0
    assert output.startswith(f"usage: shardserve {command} ")
    assert COMMANDS[command].description
    assert f"\n  shardserve {command} " in output.partition("example")[2]
    assert max(map(len, output.partition("example")[0].splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_of_each_option_what_it_is_and_its_default(command):
    for action in COMMANDS[command]._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[-1] if action.option_strings else action.dest
        assert action.help, name
        if action.option_strings and not action.required and action.nargs != 0:
            repeats = isinstance(action.default, (list, dict)) and not action.default
            assert "default" in action.help or repeats, name


def test_the_command_itself_has_help_for_all(capsys):
    code, output, _ = run(["--help"], capsys)
    assert code == 0
    for command, subparser in COMMANDS.items():
        assert f"\n    {command}" in output
        assert subparser.description.strip()
    assert run(["--version"], capsys)[0] == 0


@pytest.mark.parametrize(("arguments", "said"), WRONG_USAGE, ids=lambda value: " ".join(value) if value else "none")
def test_a_wrong_command_line_is_exit_code_2(arguments, said, capsys):
    code, output, error = run(arguments, capsys)
    assert code == 2
    assert output == ""
    assert any(text in error for text in said.split("|"))
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "local", "--rank-table", "r.json", "--devices", "0"), "--devices is for a servable that is not"),
        (("up", "local", "--model-dir", "m", "--devices", "0"), "--devices is for a servable that is not distributed"),
        (("serve", ".", "--servable", "one", "--rank-table", "r", "--device-type", "cpu"), "--device-type"),
    ],
)
def test_options_that_are_missing_or_do_not_go_together_are_exit_code_2(folder, arguments, said, capsys):
    code, output, error = run(arguments, capsys)
    assert code == 2
    assert output == ""
    assert said in error
    assert error.startswith(f"shardserve {arguments[0]}: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*EXPORT[:1], "nowhere:f", *EXPORT[2:]), "can't import 'nowhere'"),
        (("inspect", "nowhere"), "nowhere/device0/group_config.json"),
        (("rank-table", "--host", "10.0.0.1:2", "--out", "nowhere/table.json"), "nowhere/table.json: No such file"),
        (("up", "nowhere"), "there is no directory {folder}/nowhere"),
        (("up", "empty"), "{folder}/empty: has no servable"),
        (("up", "."), "has 2 servables (one, two): say which with --servable"),
        (("serve", ".", "--rank-table", "r.json"), "has 2 servables (one, two): say which with --servable"),
        (("serve", ".", "--servable", "one"), "servable 'one' is distributed: give its --rank-table"),
        (
            ("up", "sharded", "--devices", "0,1"),
            "--devices is for a servable that is not distributed; 'net' has its ranks' shards in {folder}/sharded/",
        ),
        (
            ("up", "model-only"),
            "there is no {folder}/model-only/model/device0/group_config.json: export the model first",
        ),
        (("serve", "nowhere", "--rank-table", "r.json"), "there is no directory {folder}/nowhere"),
        (("agents", "nowhere.json"), "there is no file {folder}/nowhere.json"),
        ((*AGENTS, "--join-secret-file", "nowhere"), "join_secret_file {folder}/nowhere: No such file"),
        (("status", "127.0.0.1:1"), "127.0.0.1:1: UNAVAILABLE"),
        (("infer", "127.0.0.1:1", "m", "p", "--input", "x=nowhere.npy"), "nowhere.npy"),
        (("bench", "127.0.0.1:1", "m", "p"), "127.0.0.1:1: UNAVAILABLE"),
        (("bench", "127.0.0.1:1", "m", "p", "--json", "nowhere/b.json"), "there is no directory {folder}/nowhere"),
        (("trace", "127.0.0.1:1", "--out", "trace.json"), "127.0.0.1:1: UNAVAILABLE"),
        (("trace", "127.0.0.1:1", "--out", "empty"), "{folder}/empty is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_there_is_exit_code_1_in_one_line(folder, arguments, said, capsys):
    code, output, error = run(arguments, capsys)
    assert code == 1
    assert output == ""
    assert error.startswith(f"shardserve {arguments[0]}: ")
    assert said.format(folder=folder) in error
    assert error.count("\n") == 1


def test_up_says_that_a_table_of_other_hosts_is_not_for_it(folder, capsys):
    exported = folder / "one" / "model" / "device0"
    exported.mkdir(parents=True)
    (exported / "group_config.json").write_text(json.dumps(CONFIG))
    main(["rank-table", "--host", "127.0.0.1:1", "--host", "192.0.2.1:1", "--out", "two.json"])
    arguments = ["up", ".", "--servable", "one", "--model-dir", "one/model", "--rank-table", "two.json"]
    code, _, error = run(arguments, capsys)
    assert code == 1
    assert f"rank table {folder}/two.json: 192.0.2.1 is no address of this host" in error
    assert "`shardserve serve` and `shardserve agents`" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("table", "said"), [("nowhere.json", "No such file"), ("broken.json", "not JSON"), ("empty", "Is a directory")]
)
def test_an_unreadable_rank_table_is_exit_code_1(folder, table, said, capsys):
    exported = folder / "one" / "model" / "device0"
    exported.mkdir(parents=True)
    (exported / "group_config.json").write_text(json.dumps(CONFIG))
    arguments = ["up", ".", "--servable", "one", "--model-dir", "one/model", "--rank-table", table]
    code, _, error = run(arguments, capsys)
    assert code == 1
    assert f"{folder}/{table}" in error
    assert said in error
    assert error.count("\n") == 1


NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
CONFIG = {
    "format_version": 1,
    "export_id": "0" * 32,
    "name": "net",
    "rank_size": 1,
    "stage_size": 1,
    "rank": 0,
    "signature": {"dims": {}, "inputs": [], "outputs": [], "conditions": []},
    "receives": [],
    "sends": [],
    "graph_file": "net.graph.json",
    "graph_sha256": NOTHING,
    "weights_file": "weights.safetensors",
    "weights_sha256": NOTHING,
    "parameter_bytes": 0,
}
