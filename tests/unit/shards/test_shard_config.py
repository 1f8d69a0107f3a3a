from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardserve.errors import InvalidInput, ShardError
from shardserve.shards.config import DimRange, ShardConfig, Signature, TensorSpec

SIGNATURE = Signature(
    {"batch": DimRange(1, 8), "length": DimRange(2)},
    (
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("pairs", "float32", ("2*batch", 4)),
        TensorSpec("scale", "float32", ()),
    ),
    (TensorSpec("y", "float32", ("batch", "length + 1")),),
    ("length % 2 == 0",),
)
SHAPES = {"ids": (3, 6), "pairs": (6, 4), "scale": ()}
DTYPES = {"ids": "int64", "pairs": "float32", "scale": "float32"}


def content() -> dict[str, Any]:
    config = ShardConfig(
        1, "id", "m", 4, 2, 3, SIGNATURE, SIGNATURE.inputs, SIGNATURE.outputs,
        "m.graph.json", "0" * 64, "weights.safetensors", "1" * 64, 12,
    )  # fmt: skip
    return config.to_dict()


def test_bind_gives_the_dims() -> None:
    dims = SIGNATURE.bind(SHAPES, DTYPES)
    assert dims == {"batch": 3, "length": 6}
    assert SIGNATURE.resolve(SIGNATURE.outputs[0], dims) == (3, 7)


def test_bind_solves_for_a_dim_that_only_an_expression_has() -> None:
    signature = Signature({"half": DimRange(1, 4)}, (TensorSpec("x", "float32", ("2*half + 1",)),), ())
    assert signature.bind({"x": (7,)}, {"x": "float32"}) == {"half": 3}
    for size, message in ((6, "of the form 2\\*half \\+ 1"), (11, "1 to 4")):
        with pytest.raises(InvalidInput, match=message):
            signature.bind({"x": (size,)}, {"x": "float32"})


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ({"scale": None}, {}, "input 'scale' is missing; the model takes: ids, pairs, scale"),
        ({"extra": (1,)}, {"extra": "int64"}, "unknown input 'extra'"),
        ({}, {"ids": "int32"}, "input 'ids' must have dtype int64, got int32"),
        ({"ids": (3, 6, 1)}, {}, r"input 'ids' must have shape \[batch, length\], got \[3, 6, 1\]"),
        ({"pairs": (6, 5)}, {}, "input 'pairs' must have size 4 at axis 1, got 5"),
        ({"pairs": (8, 4)}, {}, r"input 'pairs' must have size 6 at axis 0 \('2\*batch'\), got 8"),
        (
            {"ids": (9, 6), "pairs": (18, 4)},
            {},
            "input 'ids' must have a size of 1 to 8 at axis 0 \\('batch'\\), got 9",
        ),
        ({"ids": (3, 1)}, {}, "a size of 2 or more at axis 1"),
        ({"ids": (3, 7)}, {}, "length % 2 == 0, got batch = 3, length = 7"),
    ],
)
def test_bind_says_what_is_wrong(shapes: dict[str, Any], dtypes: dict[str, str], message: str) -> None:
    given = {name: shape for name, shape in {**SHAPES, **shapes}.items() if shape is not None}
    with pytest.raises(InvalidInput, match=message):
        SIGNATURE.bind(given, {**DTYPES, **dtypes})


def test_one_dim_in_two_inputs() -> None:
    specs = (TensorSpec("a", "float32", ("batch",)), TensorSpec("b", "float32", ("batch",)))
    signature = Signature({"batch": DimRange(1)}, specs, ())
    with pytest.raises(
        InvalidInput, match="input 'b' must have size 2 at axis 0 \\('batch', as input 'a' at axis 0\\)"
    ):
        signature.bind({"a": (2,), "b": (3,)}, {"a": "float32", "b": "float32"})


def test_bind_where_a_size_divides_by_zero() -> None:
    specs = (TensorSpec("x", "float32", ("8 // half",)),)
    with pytest.raises(InvalidInput, match="of the form 8 // half"):
        Signature({"half": DimRange(0, 4)}, specs, ()).bind({"x": (7,)}, {"x": "float32"})


def test_round_trip(tmp_path: Path) -> None:
    config = ShardConfig.from_dict(content())
    assert (config.tensor_parallel_size, config.stage, config.coordinate) == (2, 1, 1)
    file = tmp_path / "group_config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert ShardConfig.load(file) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version is 3; this release reads 1 and 2; .* written by a newer release"),
        ({"origins": [{"tensor": "a", "module": "", "placement": ""}] * 2}, "has 2 origins of 1 tensors"),
        ({"origins": [{"tensor": "a\n", "module": "", "placement": ""}]}, "can't be an origin"),
        ({"flops": "batch * width"}, "width"),
        ({"flops": "exit()"}, "unexpected"),
        ({"flops": -1}, "flops is -1"),
        ({"format_version": 0}, "format_version is 0; .* export again"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": True}, "format_version"),
        ({"name": "a b"}, "'a b' can't name a model"),
        ({"rank_size": 10**18, "stage_size": 1}, "is more than 65536"),
        ({"rank": -1}, "rank -1"),
        ({"parameter_bytes": -1}, "parameter_bytes is -1"),
        ({"parameter_bytes": 10**30}, "parameter_bytes is 1000"),
        ({"graph_file": "/etc/passwd"}, "plain file name"),
        ({"graph_file": ".."}, "plain file name"),
        ({"sends": [{"name": "y\x1b[2J", "dtype": "float32", "shape": []}]}, "can't name a tensor"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": [2**63]}]}, "has the size"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": [-1]}]}, "has the size -1"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": [2**31, 2**31]}]}, "larger than any memory"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": ["9" * 1999]}]}, "too large"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": ["batch**99"]}]}, "unexpected"),
        ({"rank": 4}, "rank 4"),
        ({"rank": "0"}, r"Expected `int`, got `str` - at `\$.rank`"),
        ({"stage_size": 3}, "stage_size 3"),
        ({"weights_file": "../weights.safetensors"}, "plain file name"),
        ({"graph_sha256": "0"}, "sha256"),
        ({"surprise": 1}, "surprise"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": ["width"]}]}, "width"),
        ({"sends": [{"name": "y", "dtype": "float33", "shape": []}]}, "float33"),
        ({"sends": [{"name": "y", "dtype": "float32", "shape": ["exit()"]}]}, "unexpected"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "group_config.json"
    file.write_text(json.dumps({**content(), **change}))
    with pytest.raises(ShardError, match=message) as raised:
        ShardConfig.load(file)
    assert str(raised.value).startswith(str(file))


def test_a_field_that_is_missing_and_files_that_are_no_configs(tmp_path: Path) -> None:
    file = tmp_path / "group_config.json"
    with pytest.raises(ShardError, match="No such file"):
        ShardConfig.load(file)
    for text in ("", "[]", "{", "\udcff".encode("utf-8", "surrogateescape")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ShardError, match=r"group_config\.json"):
            ShardConfig.load(file)
    fields = content()
    del fields["signature"]
    with pytest.raises(ShardError, match="signature"):
        ShardConfig.from_dict(fields, "rank 3")


def test_the_module_needs_no_torch() -> None:
    script = "import sys, shardserve.shards.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
