from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardserve.errors import ExportError, ShardError
from shardserve.export.weights_file import write_weights
from shardserve.shards.weights import CHUNK, DTYPES, Weights, WeightsFile

CPU = torch.device("cpu")

TENSORS = {
    "large": torch.randn(CHUNK // 4 + 5),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).bfloat16(),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "wave": torch.randn(2, 2, dtype=torch.complex64),
}


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_weights(path, layout, tensors.__getitem__)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    digest, count = write(tmp_path / "w", TENSORS)
    assert same(load_file(tmp_path / "w"), TENSORS)
    assert digest == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    assert count == sum(tensor.nbytes for tensor in TENSORS.values())


def test_each_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write(tmp_path / "w", TENSORS)
    file = WeightsFile.open(tmp_path / "w")
    assert file.begin % 64 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write(tmp_path / "w", {})
    assert load_file(tmp_path / "w") == {}
    assert WeightsFile.open(tmp_path / "w").map() == {}


@pytest.mark.parametrize("mapped", [False, True])
def test_reads_what_safetensors_writes(tmp_path: Path, mapped: bool) -> None:
    save_file(TENSORS, tmp_path / "w", {"format": "pt"})
    told: list[tuple[int, int]] = []
    weights = Weights(mapped, lambda done, total: told.append((done, total)))
    sha256 = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    loaded = weights.load(WeightsFile.open(tmp_path / "w"), sha256, CPU)
    assert same(dict(loaded), TENSORS)
    size = (tmp_path / "w").stat().st_size
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
    assert len(told) > 2
    assert weights.load(WeightsFile.open(tmp_path / "w"), sha256, CPU) is loaded
    with pytest.raises(ShardError, match="w: its sha256"):
        weights.load(WeightsFile.open(tmp_path / "w"), "0" * 64, CPU)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips(tmp_path: Path, name: str) -> None:
    value = torch.arange(6).reshape(2, 3).to(DTYPES[name])
    write(tmp_path / "w", {"x": value})
    file = WeightsFile.open(tmp_path / "w")
    for loaded in (file.map()["x"], file.read(CPU)[0]["x"]):
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded.view(torch.uint8), value.view(torch.uint8))


def test_what_is_written_to_a_mapped_tensor_stays_out_of_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "w")
    file = WeightsFile.open(tmp_path / "w")
    file.map()["x"].zero_()
    assert torch.equal(file.map()["x"], torch.ones(4))


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    size = 1 << 40
    header = json.dumps({"x": tensor("U8", (size,), (0, size))}).encode()
    with (tmp_path / "w").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert int(WeightsFile.open(tmp_path / "w").map()["x"][-1]) == 0


def test_what_is_mapped_is_what_was_hashed(tmp_path: Path) -> None:
    sha256, _ = write(tmp_path / "w", {"x": torch.ones(4)})
    write(tmp_path / "new", {"x": torch.zeros(4)})

    def replace(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "new").rename(tmp_path / "w")

    loaded = Weights(mapped=True, told=replace).load(WeightsFile.open(tmp_path / "w"), sha256, CPU)
    assert not (tmp_path / "new").exists()
    assert torch.equal(loaded["x"], torch.ones(4))


def test_what_is_read_stays_when_the_file_changes(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "w")
    tensors, _ = WeightsFile.open(tmp_path / "w").read(CPU)
    (tmp_path / "w").write_bytes(b"\0" * (tmp_path / "w").stat().st_size)
    assert torch.equal(tensors["x"], torch.ones(4))


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\x80\x04pickle!", "cut short"),
        (file_of(b"{", b""), "no JSON"),
        (file_of(b"[" * 100_000, b""), "no JSON"),
        (file_of([1], b""), "no object"),
        (file_of({"x": tensor()}, b"1234567"), "cut short or damaged"),
        (file_of({"x": tensor()}, b"123456789"), "cut short or damaged"),
        (file_of({"x": tensor(dtype="F4")}, b"12345678"), "'x' has the dtype 'F4'"),
        (file_of({"x": tensor(dtype=["F4"])}, b"12345678"), "'x' has the dtype"),
        (file_of({"x": tensor(shape=[3])}, b"12345678"), r"'x' of shape \[3\] and F32 has 8 bytes"),
        (file_of({"x": tensor(shape=[-2])}, b"12345678"), r"'x' has the shape \[-2\]"),
        (file_of({"x": tensor(shape=[2.0])}, b"12345678"), r"'x' has the shape \[2.0\]"),
        (file_of({"x": tensor(shape=4)}, b"12345678"), "'x' has no dtype, shape and data_offsets"),
        (file_of({"x": 1}, b""), "'x' has no dtype, shape and data_offsets"),
        (file_of({"x": tensor(), "y": tensor(offsets=(9, 17))}, b"1" * 17), "'y' doesn't begin where"),
        (file_of({"x": tensor(), "y": tensor()}, b"1" * 8), "'y' doesn't begin where"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ShardError, match=rf"w\.safetensors: .*{message}"):
        WeightsFile.open(tmp_path / "w.safetensors")


def test_a_value_that_is_not_what_was_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'x' is float64 \[2\], the graph has float32 \[2\]"):
        write_weights(tmp_path / "w", {"x": (torch.float32, (2,))}, lambda _: torch.ones(2).double())
    with pytest.raises(ExportError, match="'x' is complex128, which weights files can't hold"):
        write(tmp_path / "w", {"x": torch.ones(2, dtype=torch.complex128)})
