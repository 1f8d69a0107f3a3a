import pytest

from shardserve.cli import main


@pytest.mark.parametrize("command", ["serve", "agents"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert f"shardserve {command}" in output.partition("example")[2]
    assert "--join-secret-file" in output


@pytest.mark.parametrize("arguments", [["serve", "."], ["agents"], ["agents", "a", "--device-type", "tpu"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--certificate", "cert.pem"], "--certificate and --private-key: TLS needs both"),
        (["--verify-client"], "--certificate and --private-key: TLS needs both"),
        (["--join-secret-file", "/nowhere"], "join_secret_file /nowhere: No such file or directory"),
        ([], "distributed_address 192.0.2.1 can be reached from other hosts: give join_secret_file or ssl_config"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, capsys):
    graph = tmp_path / "net.graph.json"
    graph.touch()
    assert main(["agents", str(graph), "--distributed-address", "192.0.2.1:6200", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shardserve: {said}")
    assert error.count("\n") == 1
