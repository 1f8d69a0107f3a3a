import asyncio
import json

import ml_dtypes
import numpy as np
import pytest
from main_harness import Launcher, Worker, announce, attached
from msgspec import structs
from ports import free_port

from shardserve.cli import main
from shardserve.cli.commands import infer, status
from shardserve.wire.messages import Generation, front


def run_command(module, *arguments):
    return main([module.__name__.rpartition(".")[2], *map(str, arguments)])


def serve(test, greeting=None):
    async def run():
        async with Launcher() as launcher:
            address = await launcher.grpc()
            async with attached(launcher, Worker(greeting=greeting or announce(counter=3))):
                await asyncio.to_thread(test, address)

    asyncio.run(run())


def test_status_as_json(capsys):
    def test(address):
        assert run_command(status, address, "--json") == 0

    serve(test)
    found = json.loads(capsys.readouterr().out)
    [servable] = found["servables"]
    assert (servable["name"], servable["version"], servable["state"]) == ("echo", 1, "ready")
    assert (servable["rank_size"], servable["stage_size"]) == (1, 1)
    [replica] = servable["replicas"]
    assert (replica["replica"], replica["generation"], replica["state"]) == (0, [1, 3], "serving")
    rank = {"rank": 0, "stage": 0, "host": "127.0.0.1", "device": "cpu", "pid": 4242, "state": "serving"}
    assert replica["ranks"] == [rank]


def test_status_as_a_table(capsys):
    serve(lambda address: run_command(status, address))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "echo version 1: ready"
    assert "  predict(x) -> x" in lines
    assert "  replica 0: serving, generation 1.3, restarts 0" in lines
    assert lines[-1].split() == ["0", "0", "127.0.0.1", "cpu", "4242", "serving"]


def test_status_of_a_rank_that_is_absent(capsys):
    ranks = front.RankStatus(0, 0, "10.0.0.7", "", 0, "absent"), front.RankStatus(1, 1, "10.0.0.8", "cpu", 9, "joined")
    replica = front.ReplicaStatus(0, Generation(2, 1), "waiting", 3, ranks, 4, "rank 0: no such file")
    greeting = structs.replace(announce(state="starting", reason="1 of 2"), replicas=(replica,))

    def test(address):
        assert run_command(status, address) == run_command(status, address, "--json") == 0

    serve(test, greeting)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "echo version 1: starting (1 of 2)"
    assert lines[4] == "    rank 0: no such file"
    assert [line.split() for line in lines[5:8]] == [
        ["rank", "stage", "host", "device", "pid", "state"],
        ["0", "0", "10.0.0.7", "-", "-", "absent"],
        ["1", "1", "10.0.0.8", "cpu", "9", "joined"],
    ]
    [found] = json.loads("\n".join(lines[8:]))["servables"][0]["replicas"]
    assert (found["restarts"], found["dropped"], found["reason"]) == (3, 4, "rank 0: no such file")
    assert found["ranks"][0] == {
        "rank": 0,
        "stage": 0,
        "host": "10.0.0.7",
        "device": "",
        "pid": None,
        "state": "absent",
    }


@pytest.mark.parametrize("module", [status, infer])
def test_nobody_answers(module, capsys):
    address = f"127.0.0.1:{free_port()}"
    assert run_command(module, address, *(["echo", "predict"] if module is infer else [])) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shardserve {module.__name__.rpartition('.')[2]}: {address}: UNAVAILABLE")
    assert error.count("\n") == 1


def test_infer_from_files_to_files(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.float32))

    def test(address):
        command = [address, "echo", "predict", "--output-dir", tmp_path / "out"]
        assert run_command(infer, *command, "--input", f"x={tmp_path}/x.npy") == 0
        assert run_command(infer, *command, "--input", f"z={tmp_path}/x.npy") == 1
        assert run_command(infer, *command, "--input", f"x={tmp_path}/none.npy") == 1

    serve(test)
    out, err = capsys.readouterr()
    assert out == "x: float32 [3]\n[0. 1. 2.]\n"
    assert np.load(tmp_path / "out" / "x.npy").tolist() == [0, 1, 2]
    assert "unknown 'z'" in err
    assert f"{tmp_path}/none.npy" in err


def test_pickles_are_not_read(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    assert run_command(infer, "127.0.0.1:1", "echo", "predict", "--input", f"x={tmp_path}/x.npy") == 1
    (tmp_path / "y.npy").write_text("1 2 3")
    assert run_command(infer, "127.0.0.1:1", "echo", "predict", "--input", f"y={tmp_path}/y.npy") == 1
    assert capsys.readouterr().err.splitlines() == [
        f"shardserve infer: input {name!r}: {tmp_path}/{name}.npy is no .npy or .npz file, or holds Python objects"
        for name in "xy"
    ]


def test_an_output_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "y.npy").touch()
    for folder in ("y.npy", "y.npy/deeper"):
        assert run_command(infer, "127.0.0.1:1", "echo", "predict", "--output-dir", tmp_path / folder) == 1
        error = capsys.readouterr().err
        assert error == f"shardserve infer: --output-dir: {tmp_path}/y.npy is a file, not a directory\n"


def test_wrong_usage_and_help(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(infer, "a:1", "echo", "predict", "--input", "x")
    assert caught.value.code == 2
    for module in (status, infer):
        with pytest.raises(SystemExit) as caught:
            run_command(module, "--help")
        assert caught.value.code == 0
        assert "example:" in capsys.readouterr().out


COMMAND = ["127.0.0.1:1", "echo", "predict"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*COMMAND, "--input", "x=a.npy", "--input", "x=b.npy"], "the input 'x' is given twice: a.npy and b.npy"),
        *(
            ([*COMMAND, f"--timeout={value}"], f"--timeout: {value!r} isn't a positive number of seconds")
            for value in ("nan", "0", "-1", "-inf", "soon")
        ),
        *(
            ([*COMMAND, f"--version={value}"], f"--version: {value!r} isn't a number from 0 (the latest) to")
            for value in ("-1", "x", "1.0", str(2**64))
        ),
        *(
            ([address, "echo", "predict"], f"ADDRESS: {address!r} isn't host:port")
            for address in ("127.0.0.1", "http://127.0.0.1:1500", "127.0.0.1:70000")
        ),
        (["unix:", "echo", "predict"], "ADDRESS: 'unix:' has no path"),
    ],
)
def test_wrong_usage_is_named(capsys, arguments, text):
    with pytest.raises(SystemExit) as caught:
        run_command(infer, *arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["localhost"], ["localhost:1", "--timeout", "0"]])
def test_wrong_usage_of_status(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run_command(status, *arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("names", [("", "predict"), ("echo", "")])
def test_names_that_are_none(capsys, names):
    assert run_command(infer, "127.0.0.1:1", *names) == 1
    assert "_name='' is not a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "saved"),
    [("text", "text"), (np.array(["a", "b"], object), ["a", "b"]), (np.array([1.5], ml_dtypes.bfloat16), [1.5])],
)
def test_outputs_that_npy_has_no_dtype_for(tmp_path, value, saved):
    infer._save(tmp_path / "y.npy", value)
    assert np.load(tmp_path / "y.npy").tolist() == saved
