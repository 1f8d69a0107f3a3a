"""`verify_chain`: subgraphs that share buffers, one after the other."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ExportError
from shardserve.export import Plan, Subgraph, VerifyResult, export_subgraphs, verify, verify_chain
from shardserve.export.subgraphs import calling

ROWS = 6


class Notes(nn.Module):
    """`put` writes a row of its notes and gives nothing of them; `read` sums them up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.write, self.ask, self.answer = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("rows", torch.zeros(ROWS, 8))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def put(self, x: Tensor) -> Tensor:
        y = self.write(x)
        self.rows.index_copy_(0, self.at, y.sum(0, keepdim=True))
        self.at += 1
        return self.answer(y)

    def read(self, x: Tensor) -> Tensor:
        weights = torch.arange(1.0, ROWS + 1)[:, None]
        return self.answer(self.ask(x) - (self.rows * weights).sum(0))


PLAN = Plan({"write.*": "Shard(0)", "ask.*": "Shard(0)", "answer.weight": "Shard(1)"})


def notes(out: Path, **options: Any) -> tuple[Notes, dict[str, Subgraph]]:
    model, x = Notes(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    batch = Dim("batch", min=1, max=5)
    subgraphs = {
        method: Subgraph((x,), dynamic_shapes=({0: batch},), output_names=["y"], method=method)
        for method in ("put", "read")
    }
    export_subgraphs(model, subgraphs, name="m", out=out, **options)
    return model, subgraphs


def test_dims_of_one_name_have_one_size(tmp_path: Path) -> None:
    model, subgraphs = notes(tmp_path)
    x = torch.randn(3, 4)
    subgraphs["read"] = replace(subgraphs["read"], args=(x,), dynamic_shapes=({0: Dim("batch", min=3, max=9)},))
    export_subgraphs(model, subgraphs, name="m", out=tmp_path)
    sizes: list[list[int]] = []
    put, read = model.put, model.read
    model.put = lambda x: sizes.append([len(x)]) or put(x)
    model.read = lambda x: sizes[-1].append(len(x)) or read(x)
    assert chain(model, subgraphs, tmp_path).passed
    # The examples; then those of `put`, as far as `read` takes them.
    assert sizes == [[2, 3, 3], [1, 3, 3], [5, 5, 5]]


def alone(model: nn.Module, subgraphs: dict[str, Subgraph], out: Path) -> list[bool]:
    """Whether each of them passes by itself."""
    passed = []
    for name, subgraph in subgraphs.items():
        with calling(model, subgraph.method):
            passed.append(verify(model, subgraph.args, subgraph.kwargs, out / name, "m").passed)
    return passed


def chain(model: nn.Module, subgraphs: dict[str, Subgraph], out: Path, name: str = "m") -> VerifyResult:
    result = verify_chain(model, subgraphs, out, name)
    assert result is not None
    return result


def alter_graph(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a rank's graph file says, and make its checksum right again."""
    (file,) = folder.glob("*.graph.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    config = json.loads((folder / "group_config.json").read_text())
    config["graph_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "group_config.json").write_text(json.dumps(config))


def only(content: dict[str, Any], op: str) -> dict[str, Any]:
    (node,) = (node for node in content["nodes"] if op in node["op"])
    return node


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_what_is_right_passes_and_the_model_stays_as_it_was(tmp_path: Path, tp: int, pp: int) -> None:
    options = {"plan": PLAN} if tp > 1 else {}
    cuts = ("answer",) if pp > 1 else ()
    model, subgraphs = notes(tmp_path, tensor_parallel=tp, pipeline_parallel=pp, cuts=cuts, **options)
    result = chain(model, subgraphs, tmp_path)
    assert (result.passed, result.parting, result.notes) == (True, "", ())
    assert [dict(sizes) for sizes in result.sizes] == [{"batch": size} for size in (2, 1, 5)]
    assert [output.name for output in result.outputs] == [
        "output 'y' of put",
        "output 'y' of read",
        "a buffer after put",
        "a buffer after read",
    ]
    assert model.at.tolist() == [0]
    assert not model.rows.any()


def test_a_row_that_is_written_at_the_wrong_place(tmp_path: Path) -> None:
    """Nothing that `put` gives shows it, and `read` alone has nothing to read."""
    model, subgraphs = notes(tmp_path, tensor_parallel=2, plan=PLAN)

    def next_row(content: dict[str, Any]) -> None:
        (at,) = (state for state in content["state"] if state["tensor"] == "at")
        nodes = content["nodes"]
        write, count = only(content, "index_copy"), next(node for node in nodes if node["name"] == at["update"])
        write["args"] = json.loads(json.dumps(write["args"]).replace(f'"{at["name"]}"', f'"{count["name"]}"'))
        nodes.remove(count)
        nodes.insert(nodes.index(write), count)

    alter_graph(tmp_path / "put" / "device1", next_row)
    assert alone(model, subgraphs, tmp_path) == [True, True]
    result = chain(model, subgraphs, tmp_path)
    assert not result.passed
    assert re.fullmatch(
        r"they part in the buffer 'rows', which put leaves off by up to [\d.]+ on rank 1", result.parting
    )
    assert result.worst.startswith("a buffer after put with batch = ")
    assert result.worst.endswith("in the order put: 'rows' on rank 1")


def test_a_buffer_that_is_read_wrongly(tmp_path: Path) -> None:
    model, subgraphs = notes(tmp_path, tensor_parallel=1, pipeline_parallel=2, cuts=("answer",))
    alter_graph(tmp_path / "read" / "device0", lambda content: only(content, "aten.sub").update(op="aten.add.Tensor"))
    assert alone(model, subgraphs, tmp_path) == [True, True]
    result = chain(model, subgraphs, tmp_path)
    assert not result.passed
    assert result.worst.startswith("output 'y' of read with batch = ")
    assert result.worst.endswith("in the order put, read")
    assert result.parting.startswith(
        "in read they part in pipeline stage 0: 'sub_1', which it sends to the next, is off"
    )
    assert model.at.tolist() == [0]


class Filling(nn.Module):
    """`fill` writes a row for each of x, `step` the next one; there are 6."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(ROWS, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def fill(self, x: Tensor) -> Tensor:
        self.rows.index_copy_(0, torch.arange(x.shape[0]), x)
        self.at.fill_(x.shape[0])
        return x + 1

    def step(self, x: Tensor) -> Tensor:
        self.rows.index_copy_(0, self.at, x)
        self.at += 1
        return self.rows.sum(0)


def filling(out: Path, rows: int) -> tuple[Filling, dict[str, Subgraph]]:
    model, x = Filling(), torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    subgraphs = {
        "fill": Subgraph((x,), dynamic_shapes=({0: Dim("rows", min=1, max=ROWS)},), method="fill"),
        "step": Subgraph((x[:1].clone(),), method="step"),
    }
    export_subgraphs(model, subgraphs, name="m", out=out)
    return model, subgraphs


def test_a_chain_ends_where_the_model_itself_raises(tmp_path: Path) -> None:
    model, subgraphs = filling(tmp_path, 2)
    result = chain(model, subgraphs, tmp_path)
    assert result.passed
    assert [sizes["rows"] for sizes in result.sizes] == [2, 1, 6, 5]
    once, twice = result.notes
    assert twice.startswith("with rows = 5 in the order fill, step, step the model itself raises IndexError: ")
    assert once.startswith("with rows = 6 in the order fill, step the model itself raises IndexError: ")
    assert not model.rows.any()


def test_a_model_that_raises_with_its_example_inputs(tmp_path: Path) -> None:
    model, subgraphs = filling(tmp_path, ROWS)
    said = "can't be compared one after the other: with rows = 6 in the order fill, step the model itself raises Index"
    with pytest.raises(ExportError, match=said):
        verify_chain(model, subgraphs, tmp_path, "m")
    assert not model.rows.any()


def test_subgraphs_that_share_no_buffer_are_no_chain(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sums", torch.zeros(4))

        def one(self, x: Tensor) -> Tensor:
            return x + 1

        def two(self, x: Tensor) -> Tensor:
            self.sums += x.sum(0)
            return self.sums * 2

    model, x = Plain(), torch.randn(2, 4)
    subgraphs = {method: Subgraph((x,), method=method) for method in ("one", "two")}
    export_subgraphs(model, subgraphs, name="m", out=tmp_path)
    assert verify_chain(model, subgraphs, tmp_path, "m") is None
