from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardserve.errors import ExportError
from shardserve.export import load_checkpoint

ONE, TWO = torch.arange(3.0), torch.ones(2, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"one": ONE, "left": ONE + 1}, tmp_path / "a.safetensors")
    save_file({"two": TWO}, tmp_path / "b.safetensors")
    return tmp_path


def index(folder: Path, content: Any, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_a_file(folder: Path) -> None:
    found = load_checkpoint(folder / "a.safetensors")
    assert found.tensors.keys() == {"one", "left"}
    assert torch.equal(found.tensors["one"], ONE)
    assert found.origins["one"] == str(folder / "a.safetensors")


def test_files_and_a_folder_without_an_index(folder: Path) -> None:
    for weights in ([folder / "a.safetensors", str(folder / "b.safetensors")], str(folder)):
        found = load_checkpoint(weights)
        assert found.tensors.keys() == {"one", "left", "two"}
        assert torch.equal(found.tensors["two"], TWO)


def test_an_index_says_which_tensors(folder: Path) -> None:
    file = index(folder, {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}})
    assert load_checkpoint(folder).tensors.keys() == load_checkpoint(file).tensors.keys() == {"one", "two"}


def test_the_preferred_file_of_a_folder(folder: Path) -> None:
    save_file({"whole": ONE}, folder / "model.safetensors")
    assert load_checkpoint(folder).tensors.keys() == {"whole"}


def test_a_state_dict() -> None:
    assert load_checkpoint({"one": ONE}).tensors["one"] is ONE


def test_renaming(folder: Path) -> None:
    found = load_checkpoint(folder / "a.safetensors").renamed({"one": "x.one"})
    assert found.tensors.keys() == {"x.one"}
    assert found.origins["x.one"] == f"{folder / 'a.safetensors'} ('one' there)"
    with pytest.raises(ExportError, match=r"a\.safetensors: 'left' and 'one' are both 'x'"):
        load_checkpoint(folder / "a.safetensors").renamed({"left": "x", "one": "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"one": "../a.safetensors"}}, r"'one' is in '../a\.safetensors', which isn't a file beside"),
        ({"weight_map": {"one": 3}}, "'one' is in 3"),
        ({"weight_map": {"one": "c.safetensors"}}, r"c\.safetensors: No such file"),
        ({"weight_map": {"one": "b.safetensors"}}, r"b\.safetensors: tensor 'one' is missing; the index says"),
        ({"weight_map": {"one": "model.bin"}}, r"model\.bin: may run code"),
    ],
)
def test_an_index_that_is_wrong(folder: Path, content: Any, message: str) -> None:
    index(folder, content)
    with pytest.raises(ExportError, match=message):
        load_checkpoint(folder)


def test_several_indexes(folder: Path) -> None:
    for name in ("x", "y"):
        index(folder, {"weight_map": {"one": "a.safetensors"}}, f"{name}.safetensors.index.json")
    with pytest.raises(ExportError, match=r"has 2 indexes \(x\..*, y\..*\): name one"):
        load_checkpoint(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"one": ONE}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"holds no safetensors file; pytorch_model\.bin would have to be saved"):
        load_checkpoint(tmp_path)
    with pytest.raises(ExportError, match=r"pytorch_model\.bin: may run code when it is read"):
        load_checkpoint(tmp_path / "pytorch_model.bin")


def test_what_is_no_checkpoint(folder: Path) -> None:
    (folder / "text.safetensors").write_text("hello, there is nothing to see here")
    for weights, message in (
        (folder / "text.safetensors", r"text\.safetensors: not a safetensors file"),
        (folder / "none.safetensors", "No such file"),
        ([folder / "a.safetensors"] * 2, "tensor '(one|left)' is in .*, too"),
        ({"one": 3}, "'one' is int; a state dict has tensors"),
        ({"one": torch.ones(2, device="meta")}, "'one' is on the meta device"),
        (3, "int is neither a path"),
        ([3], "list is neither a path"),
    ):
        with pytest.raises(ExportError, match=message):
            load_checkpoint(weights)  # type: ignore[arg-type]
