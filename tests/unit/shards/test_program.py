from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ShardError
from shardserve.export import export
from shardserve.shards import operators
from shardserve.shards.collective import SingleRank
from shardserve.shards.graph import Device, GraphFile, Node, Ref, Size, decode_argument, encode_argument
from shardserve.shards.program import Program
from shardserve.shards.weights import Weights


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(self.linear(x), max=float("inf"))


def test_programs_that_are_given_the_same_weights_share_them(exported: tuple[Path, nn.Module]) -> None:
    folder, _ = exported
    weights = Weights()
    one, two, alone = (Program.load(folder / "small.graph.json", weights=given) for given in (weights, weights, None))
    pointers = [[tensor.data_ptr() for tensor in program.parameters] for program in (one, two, alone)]
    assert pointers[0] == pointers[1]
    assert not set(pointers[0]) & set(pointers[2])
    x = torch.ones(1, 4)
    assert torch.equal(one.run({"batch": 1}, [x], SingleRank())[0], alone.run({"batch": 1}, [x], SingleRank())[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model, out = Small(), tmp_path_factory.mktemp("small")
    export(model, (torch.randn(2, 4),), name="small", out=out, dynamic_shapes=({0: Dim("batch", min=1)},))
    return out / "device0", model


@pytest.fixture
def shard(exported: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    """A copy of the shard's folder, to be spoiled."""
    return Path(shutil.copytree(exported[0], tmp_path / "device0"))


def change_graph(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter the graph and put its new checksum into the config, as someone with bad intentions would."""
    file, config_file = folder / "small.graph.json", folder / "group_config.json"
    graph = json.loads(file.read_text())
    change(graph)
    file.write_text(json.dumps(graph))
    reseal(folder)
    assert config_file.exists()


def reseal(folder: Path) -> None:
    file = folder / "group_config.json"
    config = json.loads(file.read_text())
    for kind in ("graph", "weights"):
        config[f"{kind}_sha256"] = hashlib.sha256((folder / config[f"{kind}_file"]).read_bytes()).hexdigest()
    file.write_text(json.dumps(config))


def test_runs_as_the_model_does(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    program = Program.load(folder / "small.graph.json")
    assert program.collective_count == 0
    with torch.inference_mode():
        for batch in (1, 2, 5):
            x = torch.randn(batch, 4)
            assert torch.equal(program.run({"batch": batch}, [x], SingleRank())[0], model(x))
    assert [tuple(x.shape) for x in program.drain({"batch": 3}, SingleRank())] == [(3, 3)]


def test_a_config_elsewhere(shard: Path, tmp_path: Path) -> None:
    config = shutil.move(shard / "group_config.json", tmp_path / "other.json")
    assert Program.load(shard / "small.graph.json", config).config.name == "small"
    with pytest.raises(ShardError, match=r"group_config\.json"):
        Program.load(shard / "small.graph.json")


@pytest.mark.parametrize("name", ["small.graph.json", "weights.safetensors"])
def test_an_altered_file(shard: Path, name: str) -> None:
    content = bytearray((shard / name).read_bytes())
    content[-3] ^= 1
    (shard / name).write_bytes(content)
    with pytest.raises(ShardError, match=f"{name}: its sha256"):
        Program.load(shard / "small.graph.json")


def test_a_missing_file(shard: Path) -> None:
    (shard / "weights.safetensors").unlink()
    with pytest.raises(ShardError, match=r"weights\.safetensors: No such file"):
        Program.load(shard / "small.graph.json")


def test_another_graph_than_the_config_names(shard: Path) -> None:
    shutil.copy(shard / "small.graph.json", shard / "other.graph.json")
    with pytest.raises(ShardError, match=r"describes 'small.graph.json', not 'other.graph.json'"):
        Program.load(shard / "other.graph.json")


def append(
    op: str, *args: Any, shape: list[int] | None = None, dtype: str | None = None, **kwargs: Any
) -> Callable[[dict[str, Any]], None]:
    def change(graph: dict[str, Any]) -> None:
        node = {"name": "extra", "op": op, "args": list(args), "kwargs": kwargs, "shape": shape, "dtype": dtype}
        graph["nodes"].append(node)

    return change


X = {"node": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append("aten.from_file.default", "/etc/passwd"), "operator 'aten.from_file.default'"),
        (append("aten.add_.Tensor", X, X), "operator 'aten.add_.Tensor'"),
        (append("aten.add.out", X, X, out=X), "operator 'aten.add.out'"),
        (append("aten.add.nothing", X, X), "operator 'aten.add.nothing'"),
        (append("aten.dropout.default", X, 0.5, True), "operator 'aten.dropout.default'"),
        (append("os.system", "true"), "operator 'os.system'"),
        (append("sym.eval", "1"), "operator 'sym.eval'"),
        (append("shardserve.__class__", X), "operator 'shardserve.__class__'"),
        (append("collective.barrier", X), "operator 'collective.barrier'"),
        (append("collective.all_reduce", X, "xor"), "arguments"),
        (append("collective.all_gather"), "arguments"),
        (append("collective.all_gather", 3), "takes a tensor"),
        (append("collective.all_reduce", X, "sum"), "needs the shape"),
        (append("collective.all_reduce", X, "avg", shape=[4], dtype="int64"), "can't form the avg of int64 tensors"),
        (append("collective.all_reduce", X, "sum", shape=[4], dtype="uint32"), "can't form the sum of uint32 tensors"),
        (append("collective.reduce_scatter", X, "sum", shape=[], dtype="float32"), "first dim can't be divided by 1"),
        (append("aten.relu.default", {"node": "nowhere"}), "'nowhere' is used and not defined"),
        (append("aten.relu.default", {"code": "exit()"}), "not an argument"),
        (append("aten.relu.default", {"expr": "exit()"}), "unexpected"),
        (append("aten.relu.default", {"expr": "width"}), "'width' isn't one of the dims"),
        (append("aten.relu.default", {"dtype": "float33"}), "unknown dtype"),
        (append("aten.relu.default", {"device": "cuda:1"}), "not an argument"),
        (append("aten.relu.default", X, **{"x=exit()": 1}), "takes no x=exit"),
        (append("aten.relu.default", X, X), "takes 1 arguments, got 2"),
        (append("aten.relu.default", X, self=X), "given self twice"),
        (append("aten.mul.Tensor", X), "needs other"),
        (append("aten.relu.default", "x"), "can't take 'x' as its self, which is Tensor"),
        (append("aten.relu.default", None), "can't take None"),
        (append("aten.zeros.default", [2], device="cuda:1"), "can't take 'cuda:1' as its device"),
        (append("aten.zeros.default", [2], device="meta"), "can't take 'meta' as its device"),
        (append("aten.zeros.default", [2], pin_memory=True), "can't take True as its pin_memory"),
        (append("aten.clone.default", X, memory_format=1), "can't take 1 as its memory_format"),
        (append("aten.zeros.default", [2**63]), "is too large"),
        (append("aten.zeros.default", [1.5]), "as its size"),
        (append("aten.zeros.default", [[[[[[[[[[[2]]]]]]]]]]]), "nested deeper than 8"),
        (append("aten.relu.default", {"dtype": ["float32"]}), "unknown dtype"),
        (append("aten.relu.default", {"float": []}), "not an argument"),
        (append("aten.relu.default", {"expr": "9 ** 999999999"}), "unexpected"),
        (append("aten.relu.default", {"expr": "9" * 1999}), "too large"),
        (append("getitem", X, 0), "getitem takes"),
        (append("getitem", X, "__class__"), "getitem takes"),
        (append("getitem", X), "getitem takes"),
        (append("sym.pow", 10, 1000000000), "sym.pow of integers"),
        (append("sym.mul", {"expr": "batch"}, {"expr": "batch"}), "sym.mul of integers"),
        (append("sym.neg", X), "sym.neg takes 1 number"),
        (append("sym.sqrt", 2, 3), "sym.sqrt takes 1 number"),
        (append("sym.__import__", "os"), "operator 'sym.__import__'"),
        (append("shardserve.embedding", X, X), "takes weight, ids, start, total"),
        (append("shardserve.embedding", X, X, X, 4), "can't take .* as its start, which is int"),
        (append("aten.__class__.default", X), "operator 'aten.__class__.default'"),
        (append("aten.add.__call__", X, X), "operator 'aten.add.__call__'"),
        (append("aten", X), "operator 'aten'"),
        (append("", X), "operator ''"),
        (append("collective.all_reduce", X, ["sum"], shape=[4], dtype="float32"), "arguments"),
        (append("collective.all_reduce", X, "sum", shape=[-4], dtype="float32"), "has the size -4"),
        (append("collective.all_reduce", X, "sum", shape=[4], dtype="string"), "unknown dtype"),
        (lambda graph: graph.update(dims=["batch", "batch"]), "has the dims"),
        (lambda graph: graph.update(dims=[]), "has the dims"),
        (lambda graph: graph["nodes"][0].update(name="__import__('os')"), "can't name a node"),
        (lambda graph: graph["nodes"][0].update(name=1), "Expected `str`"),
        (lambda graph: graph["nodes"].append(graph["nodes"][0]), "two nodes are named"),
        (lambda graph: graph["nodes"][0].update(name="a b"), "can't name a node"),
        (lambda graph: graph.update(outputs=["x", "x"]), "has 2 outputs"),
        (lambda graph: graph.update(inputs=[]), "has 0 inputs"),
        (lambda graph: graph.update(export_id="other"), "different exports"),
        (lambda graph: graph.update(format_version=99), "format_version is 99"),
        (lambda graph: graph.update(surprise=1), "surprise"),
        (lambda graph: graph["parameters"][0].update(tensor="nothing"), "tensor 'nothing' is missing"),
        (lambda graph: graph["parameters"][0].update(shape=[1]), r"the graph needs float32 \[1\]"),
    ],
)
def test_a_graph_that_is_wrong(shard: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    change_graph(shard, change)
    with pytest.raises(ShardError, match=message) as raised:
        Program.load(shard / "small.graph.json")
    assert str(shard) in str(raised.value)


def test_weights_of_another_dtype(shard: Path) -> None:
    file = shard / "weights.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    reseal(shard)
    with pytest.raises(ShardError, match="is float64"):
        Program.load(shard / "small.graph.json")


def test_weights_that_are_no_safetensors(shard: Path) -> None:
    (shard / "weights.safetensors").write_bytes(b"\x80\x04pickle")
    reseal(shard)
    with pytest.raises(ShardError, match=r"weights\.safetensors"):
        Program.load(shard / "small.graph.json")


def test_a_number_is_no_output(shard: Path) -> None:
    change_graph(shard, append("sym.sqrt", 2))
    change_graph(shard, lambda graph: graph.update(outputs=["extra"]))
    with pytest.raises(ShardError, match="the output 'extra' isn't a tensor"):
        Program.load(shard / "small.graph.json")


def test_files_of_another_export(shard: Path, tmp_path: Path) -> None:
    """Another export of the same model, equal in every shape, is told by its checksums and id alone."""
    torch.manual_seed(1)
    export(Small(), (torch.randn(2, 4),), name="small", out=tmp_path / "other", dynamic_shapes=({0: Dim("batch")},))
    for name, reason in (("small.graph.json", "its sha256"), ("weights.safetensors", "its sha256")):
        mixed = Path(shutil.copytree(shard, tmp_path / f"mixed {name}"))
        shutil.copy(tmp_path / "other" / "device0" / name, mixed / name)
        with pytest.raises(ShardError, match=f"{name}: {reason}"):
            Program.load(mixed / "small.graph.json")
        reseal(mixed)
        if name == "small.graph.json":
            with pytest.raises(ShardError, match="different exports"):
                Program.load(mixed / "small.graph.json")


def test_arguments_round_trip() -> None:
    values = [
        None, True, 3, 0.5, "tanh", Ref("x"), Size("b + 1"), Device(), torch.float16, torch.strided,
        torch.channels_last, float("inf"), float("-inf"), [1, [Ref("y"), None]],
    ]  # fmt: skip
    encoded = json.loads(json.dumps(encode_argument(values)))
    assert decode_argument(encoded) == values
    with pytest.raises(TypeError):
        encode_argument(object())


def test_a_graph_round_trip() -> None:
    node = Node("y", "collective.all_reduce", [{"node": "x"}, "sum"], {}, ("b", 4), "float32")
    graph = GraphFile(1, "id", ("b",), ("x",), (), (node,), ("y",))
    assert GraphFile.decode(graph.encode(), "graph") == graph


def test_the_allow_list_exists_and_is_functional() -> None:
    for name in operators.ATEN:
        packet = getattr(torch.ops.aten, name)
        assert any(operators.is_allowed(getattr(packet, overload)) for overload in packet.overloads()), name


def test_a_sharded_lookup_checks_its_range() -> None:
    table = torch.randn(8, 3)
    ids = torch.tensor([[0, 7], [3, 4]])
    parts = [operators.embedding(table[start : start + 4], ids, start, 8) for start in (0, 4)]
    assert torch.equal(parts[0] + parts[1], table[ids])
    for wrong in (-1, 8):
        for start in (0, 4):
            with pytest.raises(IndexError, match=f"{wrong} isn't in 0 to 7"):
                operators.embedding(table[start : start + 4], torch.tensor([wrong, 2]), start, 8)
