import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import export_transformer
from terminal import OnTerminal

from shardserve.cli import main

TOOLS = Path(__file__).resolve().parents[3] / "export_tools"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    export_transformer(folder, 2, 2)
    return folder


def test_stages_ranks_collectives_and_what_crosses(exported, capsys):
    assert main(["inspect", str(exported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("transformer: 4 ranks, 2 pipeline stages, export ")
    assert "  dim batch: 1 to 32" in lines
    assert "  input ids: int64 [batch, length]" in lines
    rows = {tuple(line.split()[:2]): line for line in lines if line.split()[0].isdecimal()}
    assert rows["1", "0"].endswith("5 all_reduce")
    assert rows["2", "1"].endswith("4 all_reduce")
    assert any(line.endswith("float32 [batch, length, 64]") for line in lines)


def test_json(exported, capsys):
    assert main(["inspect", str(exported), "--json"]) == 0
    shards = json.loads(capsys.readouterr().out)
    assert [shard["config"]["rank"] for shard in shards] == [0, 1, 2, 3]
    assert shards[3]["collectives"] == {"all_reduce": 4}


def test_on_a_terminal_a_bar_while_it_reads_and_the_same_output(exported):
    piped = subprocess.run(
        [sys.executable, "-m", "shardserve.cli", "inspect", exported], check=True, capture_output=True, text=True
    )
    assert piped.stderr == ""
    assert not {character for character in piped.stdout if ord(character) < 32} - {"\n"}
    with OnTerminal(("inspect", exported)) as command:
        drawn = command.read_to_end()
        assert command.process.stdout.read() == piped.stdout
        assert command.process.wait(10) == 0
    assert "\rreading shards: 0 of 4 |" in drawn
    assert not drawn.split("\r")[-2].strip()


def test_whoever_reads_it_may_have_enough_before_the_end(exported):
    line = f"{sys.executable} -m shardserve.cli inspect {exported} --json | head -n 1"
    done = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_errors_name_the_folder(exported, tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert str(tmp_path / "device0") in capsys.readouterr().err
    shutil.copytree(exported, tmp_path / "model")
    config = tmp_path / "model" / "device2" / "group_config.json"
    config.write_text(config.read_text().replace('"export_id": "', '"export_id": "0'))
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "device2" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["rank_table", "inspect_shards", "export"])
def test_the_tools_are_commands_of_their_own(tool):
    done = subprocess.run([sys.executable, TOOLS / f"{tool}.py", "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage:")
