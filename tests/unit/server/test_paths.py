import os
import sys

from shardserve.server.paths import resolve


def test_relative_paths_are_the_scripts(tmp_path, monkeypatch):
    script = tmp_path / "scripts" / "serve.py"
    script.parent.mkdir()
    script.touch()
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert resolve("model/x.json") == str(tmp_path / "scripts" / "model" / "x.json")
    assert resolve("/absolute/x.json") == "/absolute/x.json"
    assert resolve("~/x.json") == os.path.expanduser("~/x.json")


def test_a_script_given_by_a_relative_path_or_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "serve.py").touch()
    (tmp_path / "serve.py").symlink_to(tmp_path / "real" / "serve.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    assert resolve("x") == str(tmp_path / "real" / "x")


def test_without_a_script_it_is_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ([], [""], ["-c"], ["/no/such/script"]):
        monkeypatch.setattr(sys, "argv", argv)
        assert resolve("x") == str(tmp_path / "x")
