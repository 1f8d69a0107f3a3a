"""Whatever is altered in a shard's files, by accident or with their checksums: they load or ShardError names the file.

Each test tries thousands of random alterations, the same in every run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import CASES

from shardserve.errors import ShardError
from shardserve.export import Plan, export
from shardserve.shards.config import ShardConfig
from shardserve.shards.graph import GraphFile, to_dtype
from shardserve.shards.program import Program
from shardserve.shards.weights import WeightsFile

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "batch", "__class__", [2**62, 0],
    "__import__('os')", "os.system", "../../etc/passwd", "batch ** 999999999", "batch // 0", "9" * 400, "(" * 60,
    "a" * 5000, "\x00", "\x1b[2J", [], {}, [[]], [[[[[[[[[[[[1]]]]]]]]]]]], {"node": "x"}, {"node": "nothing"},
    {"node": 1}, {"expr": "batch"}, {"expr": "exit()"}, {"dtype": "float32"}, {"dtype": []}, {"device": "self"},
    {"device": "cuda"}, {"layout": "strided"}, {"float": "nan"}, {"float": {}}, {"memory_format": []},
    {"node": "x", "expr": "1"}, "aten.add_.Tensor", "getitem", "aten.relu.default", "sym.pow",
    "collective.all_reduce", "shardserve.embedding", "aten..", "aten.add", ".",
]  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 0 of a model with collectives, sizes in expressions, scalars and several results."""
    out = tmp_path_factory.mktemp("tied")
    case = CASES["tied"]()
    export(
        case.model, case.args, name="m", out=out, tensor_parallel=2, pipeline_parallel=2, plan=Plan(case.plan),
        kwargs=case.kwargs, dynamic_shapes=case.dynamic_shapes, cuts=case.cuts,
    )  # fmt: skip
    return out / "device0"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: its container and its key or index there."""
    pending = [value]
    while pending:
        container = pending.pop()
        for key, item in list(container.items() if isinstance(container, dict) else enumerate(container)):
            yield container, key
            if isinstance(item, (dict, list)):
                pending.append(item)


def altered(original: Any, dice: random.Random) -> Any:
    """A copy with one to three places altered: replaced, removed, doubled, swapped, a key renamed."""
    content = copy.deepcopy(original)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = list(places(content))
        if not found:
            break
        container, key = dice.choice(found)
        action = dice.randrange(6)
        if action < 3:
            container[key] = copy.deepcopy(dice.choice(NASTY))
        elif action == 3:
            del container[key]
        elif action == 4:
            other, place = dice.choice(list(places(content)))
            container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            container[str(dice.choice(NASTY))[:50]] = container.pop(key)
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return content


def test_altered_configs(shard: Path) -> None:
    original = json.loads((shard / "group_config.json").read_text())
    dice, outcomes = random.Random(0), Counter[bool]()
    for _ in range(3000):
        content = altered(original, dice)
        reason = ""
        try:
            config = ShardConfig.from_dict(content, "the config")
            assert ShardConfig.from_dict(config.to_dict()) == config
        except ShardError as error:
            reason = str(error)
        assert not reason or reason.startswith("the config: ")
        outcomes[not reason] += 1
    assert outcomes[False] > 100 < outcomes[True], outcomes


def test_altered_graphs(shard: Path) -> None:
    config = ShardConfig.load(shard / "group_config.json")
    original = json.loads((shard / "m.graph.json").read_text())
    given = GraphFile.load(shard / "m.graph.json").parameters
    parameters = [torch.empty(parameter.shape, dtype=to_dtype(parameter.dtype)) for parameter in given]
    dice, outcomes = random.Random(1), Counter[bool]()
    for _ in range(2000):
        content = json.dumps(altered(original, dice)).encode()
        try:
            graph = GraphFile.decode(content, "the graph")
            Program(config, graph, parameters, torch.device("cpu"))
        except ShardError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert outcomes[False] > 100 < outcomes[True], outcomes


def test_altered_state(shard: Path, tmp_path: Path) -> None:
    """The buffers of a graph and of its config, altered alike or not, each time with new checksums."""
    folder = Path(shutil.copytree(shard, tmp_path / "device0"))
    graph = json.loads((folder / "m.graph.json").read_text())
    config = json.loads((folder / "group_config.json").read_text())
    spec = {"dtype": "float32", "shape": [4]}
    graph["state"] = [{"name": "old", "tensor": "cache", **spec, "update": "old", "fill": 0.5}]
    config["state"] = [{"name": "cache", **spec}]
    dice, outcomes = random.Random(4), Counter[bool]()
    for attempt in range(600):
        state = altered(graph["state"], dice) if attempt else graph["state"]
        if str(2**31) in json.dumps(state):
            continue  # a buffer of 8 GB is a fine one
        kept: Any = config["state"]
        if dice.random() < 0.7 and isinstance(state, list) and all(isinstance(entry, dict) for entry in state):
            kept = [{"name": entry.get("tensor"), **{key: entry.get(key) for key in spec}} for entry in state]
        content = json.dumps({**graph, "state": state}).encode()
        (folder / "m.graph.json").write_bytes(content)
        sealed = {**config, "state": kept, "graph_sha256": hashlib.sha256(content).hexdigest()}
        (folder / "group_config.json").write_text(json.dumps(sealed))
        try:
            Program.load(folder / "m.graph.json")
        except ShardError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert outcomes[False] > 100 > 20 < outcomes[True], outcomes


def test_altered_headers_of_weights(shard: Path, tmp_path: Path) -> None:
    original = (shard / "weights.safetensors").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    header["empty"] = {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}
    file, dice, outcomes = tmp_path / "weights.safetensors", random.Random(3), Counter[bool]()
    for _ in range(2000):
        text = json.dumps(altered(header, dice)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + original[end:])
        reason = ""
        try:
            WeightsFile.open(file).read(torch.device("cpu"))
        except ShardError as error:
            reason = str(error)
        assert not reason or reason.startswith(str(file))
        outcomes[not reason] += 1
    assert outcomes[False] > 100 > outcomes[True] > 20, outcomes


@pytest.mark.parametrize("name", ["group_config.json", "m.graph.json", "weights.safetensors"])
def test_flipped_bytes(shard: Path, tmp_path: Path, name: str) -> None:
    """Without new checksums a graph or weights are always refused; with them, and in the config, a file may still be
    a valid one."""
    folder = Path(shutil.copytree(shard, tmp_path / "device0"))
    file, original = folder / name, (shard / name).read_bytes()
    config = json.loads((shard / "group_config.json").read_text())
    header = 8 + int.from_bytes(original[:8], "little") if name.endswith("safetensors") else len(original)
    dice = random.Random(2)
    for attempt in range(400):
        content = bytearray(original)
        for _ in range(dice.choice((1, 1, 2, 8))):
            content[dice.randrange(header)] = dice.randrange(256)
        if dice.random() < 0.1:
            content = content[: dice.randrange(len(content))]
        file.write_bytes(content)
        sealed = attempt % 2 and name != "group_config.json"
        if sealed:
            kind = name.removeprefix("m.").split(".")[0]
            digest = hashlib.sha256(content).hexdigest()
            (folder / "group_config.json").write_text(json.dumps({**config, f"{kind}_sha256": digest}))
        elif name != "group_config.json":
            (folder / "group_config.json").write_text(json.dumps(config))
        reason = ""
        try:
            Program.load(folder / "m.graph.json")
        except ShardError as error:
            reason = str(error)
        if reason:
            assert str(folder) in reason
        else:
            assert sealed or name == "group_config.json" or bytes(content) == original
