from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import CASES
from torch import nn

from shardserve.errors import ExportError
from shardserve.export import Plan, export
from shardserve.export.sharding.placements import Replicate, Shard, parse_placement

from ..conftest import PLAN, example_module, transformer

SHAPES = {"a.weight": (8, 6), "a.bias": (8,), "b.weight": (6, 8)}


def test_placements() -> None:
    plan = Plan({"*.weight": "Shard(1)", "a.bias": "Replicate()"})
    assert plan.placements(SHAPES, 2) == {"a.weight": Shard(1), "b.weight": Shard(1), "a.bias": Replicate()}
    assert parse_placement("Shard(dim=0, blocks=3)", "") == Shard(0, 3)
    assert str(Shard(0, 3)) == "Shard(0, blocks=3)"


@pytest.mark.parametrize(
    ("parameters", "size", "message"),
    [
        ({"c.*": "Shard(0)"}, 2, r"'c.\*' matches no parameter"),
        ({"a.*": "Shard(0)", "*.weight": "Shard(1)"}, 2, r"'a.weight' is Shard\(0\) by 'a.\*' and Shard\(1\) by"),
        ({"a.bias": "Shard(1)"}, 2, r"'a.bias' of shape \[8\] has no dim 1"),
        ({"b.weight": "Shard(0)"}, 4, "dim 0 of parameter 'b.weight' has size 6, which doesn't divide into 4 ranks"),
        ({"a.bias": "Shard(0, blocks=3)"}, 2, "3 blocks on 2 ranks"),
    ],
)
def test_what_a_plan_may_not_say(parameters: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Plan(parameters).placements(SHAPES, size)


@pytest.mark.parametrize("text", ["Shard", "Shard(-1)", "Shard(0", "replicate", "Shard(0, blocks=0)", ""])
def test_what_is_not_a_placement(text: str) -> None:
    with pytest.raises(ExportError, match="not a placement"):
        Plan({"a": text})


def test_the_same_placement_by_two_patterns_is_no_conflict() -> None:
    assert Plan({"a.*": "Shard(0)", "a.bias": "Shard(0)"}).placements(SHAPES, 2)["a.bias"] == Shard(0)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"parameters": {"a": "Shard(0)"}, "cuts": ["b"]}')
    assert Plan.load(file) == Plan({"a": "Shard(0)"}, ("b",))
    for plan in (Plan({"a": "Shard(0)"}, ("b",)), Plan({"a": "Replicate()"}, auto=True)):
        plan.save(file)
        assert Plan.load(file) == plan
    with pytest.raises(ExportError, match="No such file"):
        plan.save(tmp_path / "nowhere" / "plan.json")
    for content, message in (
        ('{"parameters": {"a": "Shard(0)", "a": "Shard(1)"}}', "'a' is given twice"),
        ("{", "plan.json"),
        ("[]", "a plan is an object"),
        ('{"parametres": {}}', "a plan is an object"),
        ('{"parameters": {"a": 0}}', "object of strings"),
        ('{"cuts": "b"}', "list of module names"),
        ('{"auto": 1}', "true or false"),
    ):
        file.write_text(content)
        with pytest.raises(ExportError, match=message):
            Plan.load(file)
    with pytest.raises(ExportError, match="No such file"):
        Plan.load(tmp_path / "nothing.json")


def exported(tmp_path: Path, **options: Any) -> Any:
    model, args, _ = transformer(blocks=2)  # of fixed sizes: tracing takes half the time
    return export(model, args, out=tmp_path, **{"name": "t", "plan": PLAN, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
        ({"tensor_parallel": 3}, "doesn't divide into 3 ranks"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"pipeline_parallel": 2, "cuts": ("blocks.7",)}, "cut 'blocks.7' is not a module that the model calls"),
        ({"pipeline_parallel": 3, "cuts": ("blocks.1",)}, "3 pipeline stages need 2 cuts, got 1: blocks.1"),
        ({"pipeline_parallel": 3, "cuts": ("blocks.1", "blocks.0")}, "cut 'blocks.0' begins before the cut 'blocks.1'"),
        ({"pipeline_parallel": 3, "cuts": ("blocks.1", "blocks.1")}, "cut 'blocks.1' is given twice"),
        ({"pipeline_parallel": 3, "cuts": ("blocks.1", "blocks")}, "cut 'blocks' begins before the cut 'blocks.1'"),
        ({"pipeline_parallel": 3, "cuts": ("blocks", "blocks.0")}, "cut 'blocks.0' begins where the cut 'blocks' does"),
        ({"pipeline_parallel": 2, "cuts": ("blocks.1@2",)}, "cut 'blocks.1@2': the model calls 'blocks.1' once"),
        ({"plan": Plan(cuts=("block.1",))}, "cut 'block.1' is not a module that the model calls"),
        ({"pipeline_parallel": 99}, "99 stages need 98: take at most "),
        ({"input_names": "ids"}, "input_names is 'ids': it must be a list of names"),
        ({"output_names": 3}, "output_names is 3: it must be a list of names"),
        ({"output_names": [3]}, r"output_names is \[3\]: it must be a list of names"),
        ({"input_names": ["ids"]}, "input_names must name 2 inputs"),
        ({"output_names": ["a", "b"]}, "output_names must name 1 outputs"),
        ({"tensor_parallel": 2, "plan": Plan(), "strict": True}, "shards no parameter"),
    ],
)
def test_what_an_export_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x + torch.arange(4)))


@pytest.mark.parametrize("cut", ["first", "second@1", "second"])
def test_a_stage_does_something_with_the_inputs(cut: str) -> None:
    class Shifted(Twice):
        """The addition is before the first module, and the second is called twice."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(super().forward(x))

    options: dict[str, Any] = {"name": "m", "out": None, "pipeline_parallel": 2}
    assert export(Shifted(), (torch.ones(2, 4),), cuts=(cut,), **options).stages
    with pytest.raises(ExportError, match="pipeline stage 0, before cut '0', would do nothing with the inputs"):
        export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.ones(2, 4),), cuts=("0",), **options)
    with pytest.raises(ExportError, match="cut 'second@2': the model calls 'second' 2 times, the last"):
        export(Shifted(), (torch.ones(2, 4),), cuts=("second@2",), **options)


def test_a_plan_without_sharded_parameters_warns(tmp_path: Path) -> None:
    net = example_module("matmul_distributed/export_model/net.py").Net()
    report = export(net, (torch.ones(2, 96),), name="m", out=tmp_path, tensor_parallel=2, plan=Plan())
    assert report.warnings == ("no parameter is sharded: each of the 2 ranks of a stage computes the same",)
    assert "warning" in str(report)


def test_a_tied_weight_with_two_placements(tmp_path: Path) -> None:
    case = CASES["tied"]()
    plan = Plan({"embedding.weight": "Shard(0)", "head.weight": "Replicate()"})
    with pytest.raises(ExportError, match="one tied weight"):
        export(case.model, case.args, name="t", out=tmp_path, tensor_parallel=2, plan=plan, kwargs=case.kwargs)


def test_an_operator_without_a_rule_is_named(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).sort(dim=-1)[0]

    report = export(
        Sorted(), (torch.randn(2, 4),), name="s", out=tmp_path, tensor_parallel=2, plan=Plan({"linear.*": "Shard(0)"})
    )
    assert report.gathered == {"sort": 1}
    assert "sort takes whole tensors" in report.warnings[0]


def test_the_example_plan_is_readable() -> None:
    assert json.dumps(dict(PLAN.parameters))
