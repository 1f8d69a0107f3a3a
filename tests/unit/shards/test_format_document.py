"""docs/shard-format.md is true: its field lists, limits, names and examples are those of the code."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from shardserve.export.weights_file import write_weights
from shardserve.shards import config, expressions, files, graph, operators
from shardserve.shards.collective import SingleRank
from shardserve.shards.program import Program

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "shard-format.md").read_text()
STRUCTS = [
    config.ShardConfig, config.Signature, config.DimRange, config.TensorSpec, config.Origin,
    graph.GraphFile, graph.Parameter, graph.State, graph.Node,
]  # fmt: skip


def section(heading: str) -> str:
    """What stands under a heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def rows(heading: str) -> list[list[str]]:
    """The cells of its table, without the head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_fields_and_defaults(struct: type[msgspec.Struct]) -> None:
    told: dict[str, bool] = {}
    for names, kind, *_ in rows(f"`{struct.__name__}`"):
        told.update(dict.fromkeys(quoted(names), "default" in kind))
    fields = {field.name: not field.required for field in msgspec.structs.fields(struct)}
    assert told == fields


def test_every_struct_is_told() -> None:
    found = [
        value.__name__
        for module in (config, graph)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
    ]
    assert sorted(found) == sorted(struct.__name__ for struct in STRUCTS)


def test_versions() -> None:
    text = section("Versions")
    assert f"writes {config.FORMAT_VERSION} and reads {' and '.join(map(str, config.READABLE_VERSIONS))}." in text


def test_dtypes_and_limits() -> None:
    dtypes = next(row for row in rows("`TensorSpec`") if row[0] == "`dtype`")[2]
    assert set(quoted(dtypes)) == config.DTYPES
    also = next(row for row in rows("`Parameter`") if row[0] == "`dtype`")[2]
    assert config.DTYPES | set(quoted(also)) == set(graph._DTYPES)
    assert dict(rows("What a reader refuses")) == {
        "bytes of group_config.json": str(files.CONFIG_LIMIT),
        "bytes of a graph file": str(files.GRAPH_LIMIT),
        "ranks": str(config.MAX_RANKS),
        "characters of an expression": str(expressions.MAX_LENGTH),
        "operators in an expression": str(expressions.MAX_OPERATORS),
        "nesting of an expression": str(expressions.MAX_DEPTH),
        "nesting of lists in an argument": str(graph.MAX_NESTING),
    }


def test_arguments() -> None:
    told: dict[str, set[str]] = {}
    for written, meaning in rows("Arguments"):
        for text in quoted(written):
            value = json.loads(text)
            graph.decode_argument(value)
            if isinstance(value, dict):
                ((kind, content),) = value.items()
                told[kind] = {content, *(quoted(meaning) if "also" in meaning else [])}
    assert told.keys() == {"node", "expr", "dtype", "device", "layout", "memory_format", "float"}
    assert told["memory_format"] == set(graph._MEMORY_FORMATS)
    assert told["float"] == set(graph._NON_FINITE)


def test_operators() -> None:
    told = {quoted(op)[0]: does for op, does in rows("Operators")}
    ours = {f"shardserve.{name}" for name in operators.KERNELS} | {
        f"collective.{name}" for name in operators.COLLECTIVES
    }
    assert told.keys() == ours | {"aten.NAME.OVERLOAD", "getitem", "sym.NAME"}
    for name, kernel in operators.KERNELS.items():
        arguments = ", ".join(inspect.signature(kernel).parameters)
        assert f"`[{arguments}]`" in told[f"shardserve.{name}"]
    assert set(quoted(told["sym.NAME"])) == operators.SYMBOLIC.keys()
    reductions = told["collective.all_reduce"].partition("`op` is ")[2]
    assert set(quoted(reductions)) == operators.REDUCTIONS


def test_the_grammar_is_the_parser_s() -> None:
    text = section("Expressions")
    grammar = text.split("```")[1].strip()
    assert expressions.__doc__ is not None
    assert [line.split() for line in grammar.splitlines()] == [
        line.split() for line in expressions.__doc__.splitlines() if ":=" in line
    ]
    for expression, value in re.findall(r"`([^`]+)` is (-?\d+)", text):
        assert expressions.parse(expression).evaluate({"batch": 3, "length": 10}) == int(value)
    assert set(quoted(re.search(r"identifier other than (.*?)\.", text)[1])) == expressions.RESERVED  # type: ignore[index]


def test_the_example_loads_and_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"`device1/(\S+)`:\n```json\n(.*?)```", section("An example"), re.DOTALL)
    assert [name for name, _ in blocks] == ["group_config.json", "linear.graph.json"]
    for name, content in blocks:
        (tmp_path / name).write_text(content)
    tensors = {"bias": torch.tensor([1.0, 2.0, 3.0]), "weight": torch.full((3, 2), 0.5)}
    layout: Any = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sha256, nbytes = write_weights(tmp_path / "weights.safetensors", layout, tensors.__getitem__)
    program = Program.load(tmp_path / "linear.graph.json")
    assert (program.config.weights_sha256, program.config.parameter_bytes) == (sha256, nbytes)
    assert program.config.graph_sha256 == hashlib.sha256(dict(blocks)["linear.graph.json"].encode()).hexdigest()
    assert program.collective_count == 1
    x = torch.tensor([[9.0, 9.0, 1.0, 3.0]])
    # What the other rank would add isn't there.
    assert program.run({"batch": 1}, [x], SingleRank())[0].tolist() == [[3.0, 4.0, 5.0]]
