import json
from pathlib import Path

import pytest

from shardserve.cli import main
from shardserve.worker.rank_table import load_rank_table

SAMPLES = sorted((Path(__file__).resolve().parents[3] / "rank_tables").glob("*.json"))


def test_there_are_samples():
    assert SAMPLES


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.stem)
def test_samples_are_tables_of_8_ranks(file):
    assert len(load_rank_table(str(file), 8, 2).entries) == 8


@pytest.mark.parametrize("layout", ["server_list", "group_list"])
def test_what_is_written_is_read_back(tmp_path, layout):
    out = tmp_path / "table.json"
    hosts = ["--host", "10.0.0.1:2", "--host", "fd00::2:0,3-4"]
    assert main(["rank-table", *hosts, "--layout", layout, "--out", str(out)]) == 0
    entries = load_rank_table(str(out), 5, 1).entries
    assert [(entry.rank, entry.host, entry.device) for entry in entries] == [
        (0, "10.0.0.1", "0"),
        (1, "10.0.0.1", "1"),
        (2, "fd00::2", "0"),
        (3, "fd00::2", "3"),
        (4, "fd00::2", "4"),
    ]


def test_standard_output(capsys):
    assert main(["rank-table", "--host", "127.0.0.1:1"]) == 0
    assert json.loads(capsys.readouterr().out)["server_list"][0]["device"][0]["rank_id"] == "0"


@pytest.mark.parametrize("host", ["10.0.0.1", "10.0.0.1:", ":3", "10.0.0.1:x", "10.0.0.1:4-2"])
def test_what_is_no_host_is_wrong_usage(host, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rank-table", "--host", host])
    assert ended.value.code == 2
    assert host in capsys.readouterr().err


def test_a_device_given_twice_is_an_error(capsys):
    assert main(["rank-table", "--host", "10.0.0.1:2", "--host", "10.0.0.1:1-1"]) == 1
    assert "is also that of" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, capsys):
    assert main(["rank-table", "--host", "10.0.0.1:2", "--out", str(tmp_path / "no" / "table.json")]) == 1
    assert "table.json" in capsys.readouterr().err
