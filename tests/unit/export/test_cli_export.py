from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardserve.cli import main
from shardserve.cli.codes import WrongUsage
from shardserve.cli.commands.export import add_parser

from .conftest import ROOT

MODULE = """
import torch
from torch import nn

def plain():
    return nn.Linear(4, 4), (torch.randn(2, 4),)

def planned():
    b = torch.export.Dim("batch", min=1, max=4)
    return nn.Linear(256, 8), [torch.randn(2, 256)], {
        "dynamic_shapes": ({0: b},), "output_names": ["y"], "plan": {"parameters": {"weight": "Shard(1)"}},
    }

def wrong():
    return nn.Linear(4, 4)

def unknown():
    return nn.Linear(4, 4), (torch.randn(2, 4),), {"dynamic": 1}

def raises():
    raise ValueError("out of cheese")

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        made.append(self.linear.weight.is_meta)

    def forward(self, x):
        return self.linear(x) + self.table

made = []

def weighted():
    with torch.device("meta"):
        model = Small()
    return model, (torch.ones(2, 4),), {"weights": "w.safetensors"}

def lost():
    return nn.Linear(4, 4), (torch.randn(2, 4),), {"weights": "none.safetensors"}

def stubborn():
    model = Small()
    model.linear.weight.data.sum().item()
    return model, (torch.ones(2, 4),), dict(weights="w.safetensors")

def says_weights():
    assert "weights"
    return Small(), (torch.ones(2, 4),)

def inside():
    return torch.zeros(-1)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(2, 4))

    def write(self, x):
        self.memory.copy_(self.linear(x))
        return self.memory * 2

    def look(self, x):
        return self.memory - self.linear(x)

def two():
    from shardserve.export import Subgraph
    x = torch.ones(2, 4)
    return Two(), (), {"subgraphs": {method: Subgraph((x,), method=method) for method in ("write", "look")}}

def two_and_an_example():
    return Two(), (torch.ones(2, 4),), two()[2]

def ill():
    model = nn.Linear(4, 4)
    model.weight.data[:] = float("nan")
    return model, (torch.ones(2, 4),)

def half():
    torch.manual_seed(0)
    plan = {"parameters": {"weight": "Shard(1)"}}
    return nn.Linear(256, 64).bfloat16(), (torch.randn(8, 256).bfloat16(),), {"plan": plan}

def whole_numbers():
    return nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 4, dtype=torch.int64),)

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "userland.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("\nnothing\n")
    (tmp_path / "half.py").write_text("x = (\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    for name in ("userland", "broken", "half"):
        sys.modules.pop(name, None)

    def call(*words: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["export", *words])
        code = args.run(args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_exports_and_verifies(run, tmp_path: Path) -> None:
    code, out, _ = run("userland:planned", "--name", "m", "--out", "model", "--tp", "2", "--verify")
    assert code == 0
    assert "1 all_reduce" in out
    assert "max abs error: " in out
    assert (tmp_path / "model" / "device1" / "m.graph.json").exists()


def test_verifies_with_given_inputs_and_tells_each_output_s_error(run, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input=np.ones((3, 256), np.float32))
    words = ("userland:planned", "--name", "m", "--out", "model", "--verify", "--inputs", "in.npz")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert re.search(r"^output y: max abs error 0 with batch = 3, max relative error 0$", out, re.MULTILINE), out
    before = (tmp_path / "model" / "device0" / "group_config.json").read_text()
    for wrong, said in (
        ({"x": np.ones((3, 256), np.float32)}, "input 'input' is missing"),
        ({"input": np.ones((3, 256), np.int64)}, "input 'input'"),
        ({"input": np.ones((9, 256), np.float32)}, "batch"),
    ):
        np.savez(tmp_path / "in.npz", **wrong)
        code, _, err = run(*words)
        assert (code, said in err, err.count("\n")) == (1, True, 1)
    # What was exported before is as it was.
    assert (tmp_path / "model" / "device0" / "group_config.json").read_text() == before
    np.savez(tmp_path / "in.npz", input=np.array(["a"]))
    assert "in.npz: 'input', <U1, can't be a tensor" in run(*words)[2]
    with pytest.raises(WrongUsage, match="--inputs is for --verify"):
        run(*words[:5], "--inputs", "in.npz")


def test_subgraphs_are_exported_together_and_verified(run, tmp_path: Path) -> None:
    code, out, err = run("userland:two", "--name", "m", "--out", "model", "--tp", "2", "--verify")
    assert (code, err) == (0, "")
    assert out.count("keeps memory: float32 ") == 2
    assert "subgraph look: compared at 1 size" in out
    assert "subgraphs in order: compared at 1 size" in out
    assert "\noutput 'output' of look: max abs error " in out
    assert "\na buffer after write: max abs error 0 with fixed sizes in the order write: 'memory' on rank " in out
    assert out.count("max abs error: ") == 3
    files = [tmp_path / "model" / name / "device1" / "m.graph.json" for name in ("write", "look")]
    assert all(file.exists() for file in files)
    code, _, err = run("userland:two_and_an_example", "--name", "m", "--out", "model")
    assert (code, "gives an example beside options['subgraphs']" in err) == (1, True)


def test_a_plan_file_goes_before_the_function_s(run, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"parameters": {"weight": "Shard(0)"}}')
    words = ("userland:planned", "--name", "m", "--out", "model", "--tp", "2", "--plan", "plan.json")
    assert "1 all_gather" in run(*words)[1]


def test_a_plan_is_found_saved_and_read_again(run, tmp_path: Path) -> None:
    words = ("userland:plain", "--name", "m", "--out", "model", "--tp", "2", "--verify")
    code, out, _ = run(*words, "--save-plan", "plan.json")
    assert (code, "1 all_" in out, "weight" in out) == (0, True, True)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["parameters"]["weight"].startswith("Shard(")
    assert run(*words, "--plan", "plan.json")[0] == 0
    assert run("userland:planned", *words[1:], "--plan", "auto")[0] == 0


def test_fails_where_nothing_was_compared(run) -> None:
    code, out, err = run("userland:ill", "--name", "m", "--out", "model", "--verify")
    assert code == 1
    assert "the model holds nan itself: 'weight'\n" in out
    assert err == "shardserve export: output 'output' is nan everywhere: nothing was compared\n"


def test_of_half_precision_the_tolerance_is_named(run) -> None:
    words = ("userland:half", "--name", "m", "--out", "model", "--tp", "2", "--verify", "--atol", "0", "--rtol", "0")
    code, _, err = run(*words)
    assert code == 1
    assert err.endswith("; a model in bfloat16 needs more, as --atol 0.05 --rtol 0.05\n")


def test_fails_above_the_tolerance(run) -> None:
    words = ("userland:planned", "--name", "m", "--out", "model", "--tp", "2", "--verify")
    code, out, err = run(*words, "--atol", "0", "--rtol", "0")
    assert code == 1
    assert "max abs error: " in out
    assert "differ from the model" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("userland:plain", "--tp", "3", "--strict"), "the plan shards no parameter"),
        (
            ("userland:plain", "--tp", "2", "--save-plan", "nowhere/plan.json"),
            "nowhere/plan.json: there is no directory nowhere",
        ),
        (("userland:plain", "--plan", "nothing.json"), "nothing.json: No such file"),
        (("userland:nothing",), "'userland' has no function 'nothing'"),
        (("userland:wrong",), "must return (model, args)"),
        (("userland:unknown",), "unknown option 'dynamic'"),
        (("nowhere:f",), "can't import 'nowhere'"),
        (("userland:raises",), "userland:raises raised: {here}/userland.py, line {line}: ValueError: out of cheese"),
        (("userland:inside",), "userland:inside raised: {here}/userland.py, line {deep}: RuntimeError: "),
        (("userland:whole_numbers",), "module '0' multiplies int64 by float32 (aten.linear.default), which raises"),
        (("userland:leaves",), "userland:leaves raised: {here}/userland.py, line"),
        (("broken:f",), "can't import 'broken': {here}/broken.py, line 2: NameError: name 'nothing' is not defined"),
        (("half:f",), "can't import 'half': SyntaxError: "),
        (("folder",), "folder/config.json: No such file"),
        (("model.pt2",), "model.pt2: no such file"),
        (("userland:lost",), "none.safetensors: No such file"),
        (("userland:plain", "--cut", "x"), "1 pipeline stages need 0 cuts"),
    ],
)
def test_what_is_wrong_is_said(run, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, _, err = run(*words, "--name", "m", "--out", "model")
    lines = MODULE.splitlines()
    line, deep = (
        number for number, text in enumerate(lines, 1) if "out of cheese" in text or "torch.zeros(-1)" in text
    )
    assert code == 1
    assert message.format(here=tmp_path, line=line, deep=deep) in err
    assert err.count("\n") == 1


def weights_file(folder: Path) -> nn.Module:
    """The file that the functions name; a module that was made with what is in it."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    save_file({f"linear.{name}": value for name, value in linear.state_dict().items()}, folder / "w.safetensors")
    return linear


@pytest.mark.parametrize(
    ("function", "meta"), [("weighted", [True]), ("stubborn", [True, False]), ("says_weights", [True, False])]
)
def test_a_module_is_made_without_storage_where_weights_are_given(run, tmp_path, function, meta) -> None:
    linear = weights_file(tmp_path)
    code, out, _ = run(f"userland:{function}", "--name", "m", "--out", "model", "--verify")
    assert code == 0
    assert "max abs error: 0\n" in out
    assert sys.modules["userland"].made == meta
    held = load_file(tmp_path / "model" / "device0" / "weights.safetensors")
    assert torch.equal(held["linear.weight"], linear.weight) == (function != "says_weights")
    assert torch.equal(held["table"], torch.arange(4.0))


def test_a_pt2_file(run, tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),))
    torch.export.save(program, tmp_path / "linear.pt2")
    code, out, _ = run("linear.pt2", "--name", "m", "--out", "model", "--verify")
    assert code == 0
    assert "input input: float32 [3, 4]" in out


def test_a_hugging_face_folder(run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    code, out, _ = run("vit", "--name", "m", "--out", "model", "--verify")
    assert code == 0
    assert "input pixel_values: float32 [batch, 3, 8, 8]" in out


@pytest.mark.parametrize("source", ["userland", "userland:", ":f"])
def test_what_is_no_source_is_wrong_usage(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", source, "--name", "m", "--out", "model"]) == 2
    assert f"SOURCE: {source!r} isn't package.module:function" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["./userland:plain", "userland.py:plain"])
def test_a_path_isn_t_a_module(run, source: str) -> None:
    with pytest.raises(WrongUsage, match=f"SOURCE: '{source}' names a path, not a module: userland:plain"):
        run(source, "--name", "m", "--out", "model")


@pytest.mark.parametrize("name", ["a/b", "", "..", "ü"])
def test_a_name_that_can_name_no_file_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "userland:plain", "--name", name, "--out", "model"])
    assert ended.value.code == 2
    assert f"--name: {name!r} isn't made of letters" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(run) -> None:
    full = ("userland:plain", "--name", "m", "--out", "o")
    for words in (full[:1], (*full[:-1], ""), (*full, "--tp", "0"), (*full, "--atol", "-1"), (*full, "--rtol", "nan")):
        with pytest.raises(SystemExit) as raised:
            run(*words)
        assert raised.value.code == 2


def test_the_thin_command(tmp_path: Path) -> None:
    script = ROOT / "export_tools" / "export.py"
    (tmp_path / "userland.py").write_text(MODULE)
    words = [sys.executable, str(script), "userland:plain", "--name", "m", "--out", "model", "--verify"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "max abs error: 0" in done.stdout
