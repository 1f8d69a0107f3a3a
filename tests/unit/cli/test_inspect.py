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
    assert "a step at batch = 3, length = 10 (the example's sizes):" in lines
    rows = {tuple(line.split()[:2]): line for line in lines if line.split()[0].isdecimal()}
    # 3 * 10 * 64 floats each
    assert rows["1", "0"].endswith("5 all_reduce: 38.4 kB")
    assert rows["2", "1"].endswith("4 all_reduce: 30.7 kB")
    crossing = "    add_238 (7.68 kB, of blocks.1, whole on each rank): float32 [batch, length, 64]"
    assert any(line.split(" (")[1:] == crossing.split(" (")[1:] for line in lines), lines


def test_other_sizes(exported, capsys):
    assert main(["inspect", str(exported), "--dims", "batch=6,length=20"]) == 0
    out = capsys.readouterr().out
    assert "a step at batch = 6, length = 20 (given):" in out
    assert "5 all_reduce: 154 kB" in out
    assert main(["inspect", str(exported), "--dims", "batch=6"]) == 0
    assert "a step at batch = 6, length = 10 (given, else the example's sizes):" in capsys.readouterr().out
    for dims, said in (
        ("width=6", "there is no dim 'width'; the model has batch, length"),
        ("batch=33", "1 to 32, got"),
    ):
        assert main(["inspect", str(exported), "--dims", dims]) == 1
        assert said in capsys.readouterr().err


def test_json(exported, capsys):
    assert main(["inspect", str(exported), "--json"]) == 0
    shards = json.loads(capsys.readouterr().out)
    assert [shard["config"]["rank"] for shard in shards] == [0, 1, 2, 3]
    last = shards[3]
    assert last["collectives"] == {"all_reduce": 4}
    assert last["dims"] == {"batch": 3, "length": 10}
    assert last["collective_bytes"] == 4 * 3 * 10 * 64 * 4
    assert last["parameter_bytes"] == sum(parameter["bytes"] for parameter in last["parameters"])
    assert last["sends"] == [{"name": "logits", "bytes": 3 * 10 * 256 * 4}]
    assert last["flops"] > 0


def test_a_page(exported, tmp_path, capsys):
    page = tmp_path / "shards.html"
    assert main(["inspect", str(exported), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "5 all_reduce a step: 38.4 kB" in page.read_text()
    assert main(["inspect", str(exported), "--html", str(tmp_path / "no" / "shards.html")]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_shards_of_the_first_version_are_shown_without_their_flops(exported, tmp_path, capsys):
    old = tmp_path / "model"
    shutil.copytree(exported, old)
    for file in old.glob("*/group_config.json"):
        config = json.loads(file.read_text())
        for field in ("origins", "flops", "example_dims"):
            del config[field]
        file.write_text(json.dumps({**config, "format_version": 1}))
    assert main(["inspect", str(old)]) == 0
    out = capsys.readouterr().out
    assert "a step at batch = 1, length = 1 (the smallest sizes):" in out
    assert out.count("unknown") == 4


def test_folders_of_no_rank_are_named(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "model")
    for device in ("device4", "device7"):
        shutil.copytree(exported / "device1", tmp_path / "model" / device)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().err == "shardserve inspect: device4, device7: not of this export, of 4 ranks\n"


@pytest.mark.parametrize(
    ("moved", "said"),
    [("device0", "is not the folder of an export"), ("device1", "there is no {}/device1, of 4 ranks")],
)
def test_what_a_killed_export_has_moved_is_named(exported, tmp_path, capsys, moved, said):
    shutil.copytree(exported, tmp_path / "model")
    former = tmp_path / "model" / ".export-abc" / "old"
    former.mkdir(parents=True)
    (tmp_path / "model" / moved).rename(former / moved)
    shutil.copytree(exported / "device0", former.parent / "device0")
    assert main(["inspect", str(tmp_path / "model")]) == 1
    err = capsys.readouterr().err
    assert said.format(tmp_path / "model") in err
    assert err.endswith(f"in place: export again, or move back what is in {former}\n")


def test_on_a_terminal_a_bar_while_it_reads_and_the_same_output(exported):
    piped = subprocess.run(
        [sys.executable, "-m", "shardserve.cli", "inspect", exported], check=True, capture_output=True, text=True
    )
    assert piped.stderr == ""
    assert not {character for character in piped.stdout if ord(character) < 32} - {"\n"}
    with OnTerminal(("inspect", exported)) as command:
        drawn = command.read_to_end()
        assert command.process.stdout.read() == piped.stdout
        assert command.process.wait(30) == 0
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
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is not the folder of an export; it holds those of model: name one" in capsys.readouterr().err
    config = tmp_path / "model" / "device2" / "group_config.json"
    config.write_text(config.read_text().replace('"export_id": "', '"export_id": "0'))
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "device2" in capsys.readouterr().err
    shutil.copytree(exported / "device1", tmp_path / "model" / "device2", dirs_exist_ok=True)
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "device2 holds the shard of rank 1" in capsys.readouterr().err
    graph = tmp_path / "model" / "device0" / "transformer.graph.json"
    graph.write_text(graph.read_text().replace("relu", "silu").replace("gelu", "silu"))
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "transformer.graph.json: its sha256" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["rank_table", "inspect_shards", "export"])
def test_the_tools_are_commands_of_their_own(tool):
    done = subprocess.run([sys.executable, TOOLS / f"{tool}.py", "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage:")
