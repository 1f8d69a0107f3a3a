"""Several ways to call one model, exported together: one copy of the weights and of the buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import Plan, Subgraph, export_subgraphs, verify, verify_chain
from shardserve.export.subgraphs import calling
from shardserve.export.verification.running import Shards
from shardserve.shards.config import ShardConfig
from shardserve.shards.program import Program
from shardserve.shards.state import StateStore
from shardserve.shards.weights import Weights

from .conftest import example_module


def test_a_decoder_in_two(tmp_path: Path) -> None:
    net = example_module("decoder/net.py")
    model, _, options = net.make()
    plan = Plan.from_dict(options["plan"])
    reports = export_subgraphs(
        model,
        options["subgraphs"],
        name="story",
        out=tmp_path,
        tensor_parallel=2,
        pipeline_parallel=2,
        plan=plan,
    )
    assert list(reports) == ["prefill", "decode"]
    prefill = Shards(tmp_path / "prefill", "story")
    decode = Shards(tmp_path / "decode", "story", beside=prefill)
    for stage in (*prefill.stages, *decode.stages):
        for program in stage:
            assert program.copied == ("length",)
            assert len(program.config.state) == 1 + 2 * net.BLOCKS // 2
    whole = net.Decoder()
    with torch.no_grad():
        for length in (2, 9):
            prefill.reset()
            ids = torch.arange(length)[None] * 7
            got, wanted = prefill.run({"ids": ids})[0], whole.prefill(ids)
            for _ in range(4):
                torch.testing.assert_close(got, wanted)
                word = wanted.argmax()[None]
                got, wanted = decode.run({"word": word})[0], whole.decode(word)
    subgraph = options["subgraphs"]["decode"]
    with calling(model, subgraph.method):
        assert verify(model, subgraph.args, None, tmp_path / "decode", "story").passed
    result = verify_chain(model, options["subgraphs"], tmp_path, "story")
    assert result is not None
    assert result.passed, result.parting
    assert {sizes["length"] for sizes in result.sizes} >= {2, 3, 8, net.PROMPT}


class Two(nn.Module):
    """`write` fills the buffer from its input, `look` only reads it; each has weights and a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.common, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("memory", torch.ones(3, 4))

    def write(self, x: Tensor) -> Tensor:
        y = self.common(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.memory.copy_(y)
        return self.first(y)

    def look(self, x: Tensor) -> Tensor:
        return self.second(self.memory + self.common(x)) * torch.tensor([5.0, 6.0, 7.0, 8.0])


def two(out: Path, **options: object) -> Two:
    model = Two()
    x = torch.randn(3, 4)
    subgraphs = {method: Subgraph((x,), method=method, output_names=["y"]) for method in ("write", "look")}
    export_subgraphs(model, subgraphs, name="two", out=out, **options)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("plan", [None, Plan({"common.*": "Shard(0)"})])
def test_what_one_writes_another_reads(tmp_path: Path, plan: Plan | None) -> None:
    model = two(tmp_path, tensor_parallel=2, plan=plan)
    write = Shards(tmp_path / "write", "two")
    look = Shards(tmp_path / "look", "two", beside=write)
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(look.run({"x": x})[0], model.look(x))
            torch.testing.assert_close(write.run({"x": x})[0], model.write(x))


def test_one_copy_of_everything(tmp_path: Path) -> None:
    two(tmp_path, tensor_parallel=1)
    files = [tmp_path / name / "device0" / "two.graph.json" for name in ("write", "look")]
    assert len({file.with_name("weights.safetensors").stat().st_ino for file in files}) == 1
    weights, state = Weights(), StateStore()
    one, other = (Program.load(file, weights=weights, state=state) for file in files)
    assert one.config.weights_sha256 == other.config.weights_sha256
    assert one.config.export_id != other.config.export_id
    common = {tensor.data_ptr() for tensor in one.parameters} & {tensor.data_ptr() for tensor in other.parameters}
    assert len(common) == 2
    assert state.nbytes == 3 * 4 * 4


def test_all_are_put_in_place_or_none(tmp_path: Path) -> None:
    def ids() -> dict[str, str]:
        configs = sorted(tmp_path.glob("*/device*/group_config.json"))
        return {str(path): ShardConfig.load(path).export_id for path in configs}

    two(tmp_path, tensor_parallel=1)
    before = ids()
    (tmp_path / "look" / "device1").symlink_to("nowhere")  # no folder can take its place
    with pytest.raises(ExportError, match=r"can't be put in place: .*Not a directory.*look/device1"):
        two(tmp_path, tensor_parallel=2)
    assert ids() == before
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["device0", "device0", "device1"]
    (tmp_path / "look" / "device1").unlink()
    two(tmp_path, tensor_parallel=2)
    assert len(ids()) == 4
    assert not ids().items() & before.items()


def test_what_is_wrong(tmp_path: Path) -> None:
    model, x = Two(), torch.ones(3, 4)
    with pytest.raises(ExportError, match="the model has no method 'read'"):
        export_subgraphs(model, {"read": Subgraph((x,), method="read")}, name="two", out=tmp_path)
    with pytest.raises(ExportError, match=r"subgraph '\.\./x' must be letters"):
        export_subgraphs(model, {"../x": Subgraph((x,), method="look")}, name="two", out=tmp_path)
    with pytest.raises(ExportError, match="no subgraph"):
        export_subgraphs(model, {}, name="two", out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "forward" not in model.__dict__
