"""The transformer in its layouts, the matmul example and others: equal to the whole model, with few collectives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.zoo import CASES

from shardserve.export import Plan, export, verify
from shardserve.export.verification.running import Shards
from shardserve.shards.config import ShardConfig
from shardserve.shards.graph import GraphFile

from .conftest import LAYOUTS, Exported, example_module

BLOCKS = 2
Layout = Callable[[int, int], Exported]


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), LAYOUTS)
def test_equal_to_the_whole_model(layout: Layout, tensor_parallel: int, pipeline_parallel: int) -> None:
    exported = layout(tensor_parallel, pipeline_parallel)
    result = verify(exported.model, exported.args, None, exported.out, exported.name, atol=1e-5, rtol=1e-5)
    assert result.passed, result
    sizes = {(dims["batch"], dims["length"]) for dims in result.sizes}
    largest = exported.report.signature.dims["batch"].max
    assert {(1, 1), (2, 2), (3, 1), (3, 64), (largest, 10)} <= sizes


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), LAYOUTS)
def test_collectives_are_at_the_optimum(layout: Layout, tensor_parallel: int, pipeline_parallel: int) -> None:
    report = layout(tensor_parallel, pipeline_parallel).report
    expected = {"all_reduce": 2 * BLOCKS + 1} if tensor_parallel > 1 else {}
    assert dict(report.collectives()) == expected
    assert not report.gathered
    assert not report.warnings


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), LAYOUTS)
def test_all_coordinates_issue_the_same_collectives(
    layout: Layout, tensor_parallel: int, pipeline_parallel: int
) -> None:
    out = layout(tensor_parallel, pipeline_parallel).out
    sequences: dict[int, list[object]] = {}
    for rank in range(tensor_parallel * pipeline_parallel):
        config = ShardConfig.load(out / f"device{rank}" / "group_config.json")
        assert (config.rank, config.stage) == (rank, rank // tensor_parallel)
        graph = GraphFile.load(out / f"device{rank}" / "transformer.graph.json")
        sequence = [
            (node.op, node.args[1:], node.shape, node.dtype) for node in graph.nodes if node.op.startswith("collective")
        ]
        assert sequences.setdefault(config.stage, sequence) == sequence


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 2), (8, 2)])
def test_what_crosses_the_cut(layout: Layout, tensor_parallel: int, pipeline_parallel: int) -> None:
    out = layout(tensor_parallel, pipeline_parallel).out
    for coordinate in range(tensor_parallel):
        before = ShardConfig.load(out / f"device{coordinate}" / "group_config.json")
        after = ShardConfig.load(out / f"device{tensor_parallel + coordinate}" / "group_config.json")
        assert before.receives == before.signature.inputs
        assert after.receives == before.sends
        assert after.sends == after.signature.outputs
        # The mask, made in stage 0, and the activation; nothing that the stage can compute again.
        assert sorted((spec.dtype, spec.shape) for spec in before.sends) == [
            ("bool", ("batch", 1, "length", "length")),
            ("float32", ("batch", "length", 64)),
        ]


def test_each_rank_holds_its_part_of_the_weights(layout: Layout) -> None:
    whole = layout(1, 2).report.stages
    for index, stage in enumerate(layout(8, 2).report.stages):
        assert max(stage.parameter_bytes) < whole[index].parameter_bytes[0] / 2.5


def test_balanced_cut(layout: Layout) -> None:
    assert layout(1, 2).report.cuts == ("blocks.1",)


def test_more_stages_than_two_forward_the_mask(layout: Layout, tmp_path: Path) -> None:
    """The mask that the last block needs passes through the stage between."""
    from .conftest import PLAN, transformer

    model, args, options = transformer(blocks=3)
    cuts = ("blocks.1", "blocks.2")
    report = export(
        model, args, name="t", out=tmp_path, tensor_parallel=2, pipeline_parallel=3, plan=PLAN, cuts=cuts, **options
    )
    assert [sum(spec.dtype == "bool" for spec in stage.sends) for stage in report.stages] == [1, 1, 0]
    assert verify(model, args, None, tmp_path, "t").passed


def test_a_column_sharded_head_is_gathered_once(tmp_path: Path) -> None:
    from .conftest import PLAN, transformer

    model, args, options = transformer(blocks=1)
    plan = Plan({**PLAN.parameters, "head.weight": "Shard(0)"})
    report = export(model, args, name="t", out=tmp_path, tensor_parallel=2, plan=plan, **options)
    assert dict(report.collectives()) == {"all_reduce": 3, "all_gather": 1}
    assert verify(model, args, None, tmp_path, "t").passed


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_matmul_on_8_ranks(tmp_path: Path, seed: int | None) -> None:
    model = example_module("matmul_distributed/export_model/net.py").Net(seed)
    args = (torch.ones(128, 96),)
    plan = Plan({"w": "Shard(0)"})
    report = export(
        model, args, name="matmul", out=tmp_path, tensor_parallel=8, plan=plan, input_names=["x"], output_names=["y"]
    )
    assert dict(report.collectives()) == {"all_reduce": 1}
    shards = Shards(tmp_path, "matmul")
    x = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(shards.run({"x": x})[0], model(x), atol=1e-5, rtol=1e-5)
        if seed is None:
            assert torch.equal(shards.run({"x": args[0]})[0], torch.full((128, 16), -48.0))
    assert sorted(path.name for path in (tmp_path / "device7").iterdir()) == [
        "group_config.json",
        "matmul.graph.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("name", CASES)
def test_models_of_many_kinds(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    report = export(
        case.model,
        case.args,
        name=name,
        out=tmp_path,
        tensor_parallel=2,
        pipeline_parallel=case.stages,
        plan=Plan(case.plan),
        kwargs=case.kwargs,
        dynamic_shapes=case.dynamic_shapes,
        cuts=case.cuts,
    )
    if case.collectives:
        assert dict(report.collectives()) == case.collectives
    result = verify(case.model, case.args, case.kwargs, tmp_path, name, atol=1e-5, rtol=1e-5)
    assert result.passed, result
    assert len(result.sizes) >= 5


def test_a_tied_weight_is_stored_once_in_a_stage(tmp_path: Path) -> None:
    case = CASES["tied"]()
    export(
        case.model, case.args, name="t", out=tmp_path, tensor_parallel=2, plan=Plan(case.plan),
        kwargs=case.kwargs, dynamic_shapes=case.dynamic_shapes,
    )  # fmt: skip
    config = ShardConfig.load(tmp_path / "device0" / "group_config.json")
    layers = 2 * (16 * 16 + 16)
    assert config.parameter_bytes == 4 * (20 * 16 + layers)


def test_an_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    model = example_module("matmul_distributed/export_model/net.py").Net()
    for ranks in (8, 2):
        export(model, (torch.ones(4, 96),), name="m", out=tmp_path, tensor_parallel=ranks, plan=Plan({"w": "Shard(0)"}))
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"device{rank}" for rank in range(ranks)]
    shutil.rmtree(tmp_path / "device1")
    (tmp_path / "device0" / "other.graph.json").write_text("left over")
    export(model, (torch.ones(4, 96),), name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"w": "Shard(0)"}))
    assert not (tmp_path / "device0" / "other.graph.json").exists()
    assert verify(model, (torch.ones(4, 96),), None, tmp_path, "m").passed
