"""What `verify` says: each output's errors, and where the shards' values part from the model's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.zoo import CASES
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ExportError, InvalidInput
from shardserve.export import Plan, export, verify
from shardserve.export.verification.compare import abs_error, close, relative_error
from shardserve.shards.config import ShardConfig

from ..conftest import PLAN, alter_weight, transformer


@pytest.fixture(scope="module")
def three_stages(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], Path]:
    model, args, options = transformer(blocks=3)
    out = tmp_path_factory.mktemp("three")
    cuts = ("blocks.1", "blocks.2")
    export(model, args, name="t", out=out, tensor_parallel=2, pipeline_parallel=3, plan=PLAN, cuts=cuts, **options)
    return model, args, options, out


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (1, "they part in pipeline stage 0: 'add_"),
        (2, "they part in pipeline stage 1: 'add_"),
        (3, "they part in pipeline stage 1: 'add_"),
        (4, "they part in pipeline stage 2, the last"),
    ],
)
def test_the_first_stage_with_other_values_is_named(three_stages, tmp_path: Path, rank: int, said: str) -> None:
    model, args, options, out = three_stages
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    weight = alter_weight(tmp_path, rank, "up.weight")
    result = verify(model, args, None, tmp_path, "t", dynamic_shapes=options["dynamic_shapes"])
    assert not result.passed
    assert result.parting.startswith(said)
    if rank < 4:
        stage = rank // 2
        assert f"of module 'blocks.{stage}'" in result.parting
        # Both ranks send what the all-reduce has given to both.
        assert f"on ranks {2 * stage}, {2 * stage + 1}; " in result.parting
    assert result.parting.endswith(f"its weights that aren't the model's: '{weight}' on rank {rank}")


def small(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*modules).eval()


def exported(model: nn.Module, out: Path, plan: dict[str, str], cut: str) -> dict[str, Any]:
    options: dict[str, Any] = {"dynamic_shapes": ({0: Dim("batch", min=1, max=8)},), "input_names": ["x"]}
    export(
        model, (torch.randn(2, 8),), name="m", out=out, tensor_parallel=2, pipeline_parallel=2,
        plan=Plan(plan), cuts=(cut,), **options,
    )  # fmt: skip
    return {"dynamic_shapes": options["dynamic_shapes"]}


def test_of_a_tensor_in_parts_the_rank_is_named(tmp_path: Path) -> None:
    model = small(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    options = exported(model, tmp_path, {"0.*": "Shard(0)", "2.weight": "Shard(1)"}, "2")
    (origin,) = ShardConfig.load(tmp_path / "device1" / "group_config.json").origins
    assert (origin.tensor, origin.module, origin.placement) == ("gelu", "1", "Shard(1)")
    assert verify(model, (torch.randn(2, 8),), None, tmp_path, "m", **options).passed
    alter_weight(tmp_path, 1, "0.weight")
    result = verify(model, (torch.randn(2, 8),), None, tmp_path, "m", **options)
    assert result.parting.startswith("they part in pipeline stage 0: 'gelu' of module '1', which it sends to the next")
    assert result.parting.endswith("on rank 1; its weights that aren't the model's: '0.weight' on rank 1")


def test_of_a_tensor_in_terms_their_sum_is_compared(tmp_path: Path) -> None:
    model = small(nn.Linear(8, 16), nn.Linear(16, 4, bias=False), nn.ReLU())
    options = exported(model, tmp_path, {"0.*": "Shard(0)", "1.weight": "Shard(1)"}, "2")
    (origin,) = ShardConfig.load(tmp_path / "device0" / "group_config.json").origins
    assert (origin.tensor, origin.module, origin.placement) == ("linear_1", "1", "Partial(sum)")
    alter_weight(tmp_path, 1, "1.weight")
    result = verify(model, (torch.randn(2, 8),), None, tmp_path, "m", **options)
    assert result.parting.startswith("they part in pipeline stage 0: 'linear_1' of module '1'")
    assert ShardConfig.load(tmp_path / "device2" / "group_config.json").origins == ()


def test_fused_weights_are_known_as_the_model_s(tmp_path: Path) -> None:
    """Of several blocks a rank has its part of each; what isn't altered isn't named."""
    case = CASES["fused_by_hand"]()
    export(
        case.model, case.args, name="m", out=tmp_path, tensor_parallel=2, plan=Plan(case.plan),
        dynamic_shapes=case.dynamic_shapes,
    )  # fmt: skip
    alter_weight(tmp_path, 1, "qkv_bias")
    result = verify(case.model, case.args, None, tmp_path, "m", dynamic_shapes=case.dynamic_shapes)
    assert result.parting.endswith("its weights that aren't the model's: 'qkv_bias' on rank 1")


def test_shards_that_do_not_say_what_crosses_are_compared_all_the_same(tmp_path: Path) -> None:
    model = small(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    options = exported(model, tmp_path, {"0.*": "Shard(0)", "2.weight": "Shard(1)"}, "2")
    for file in tmp_path.glob("*/group_config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "format_version": 1, "origins": []}))
    assert verify(model, (torch.randn(2, 8),), None, tmp_path, "m", **options).passed
    alter_weight(tmp_path, 0)
    result = verify(model, (torch.randn(2, 8),), None, tmp_path, "m", **options)
    assert not result.passed
    assert result.parting == "where they part can't be told: the shards don't say what crosses their cuts"


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"y": y * scale, "sign": y > 0}


def test_each_output_has_its_errors(tmp_path: Path) -> None:
    model, args = TwoOutputs().eval(), (torch.ones(2, 4), torch.full((4,), 1000.0))
    shapes = {"x": {0: Dim("batch", min=1, max=8)}, "scale": None}
    export(model, args, name="m", out=tmp_path, dynamic_shapes=shapes)
    result = verify(model, args, None, tmp_path, "m")
    assert [(error.name, error.max_abs, error.max_relative) for error in result.outputs] == [
        ("y", 0, 0),
        ("sign", 0, 0),
    ]
    with torch.no_grad():
        model.linear.bias += 0.5
    result = verify(model, args, None, tmp_path, "m")
    y, sign = result.outputs
    assert y.max_abs == result.max_abs_error == pytest.approx(500, rel=1e-5)
    assert 0.1 < y.max_relative < 100
    assert y.where.startswith("batch = ")
    assert result.worst == f"output 'y' with {y.where}"
    assert sign.max_abs in (0, 1)
    said = "there is one pipeline stage, so no cut at which to look; its weights that aren't the model's: "
    assert result.parting == f"{said}'linear.bias' on rank 0"


def test_given_inputs_take_the_place_of_the_example_s(tmp_path: Path) -> None:
    class Guarded(nn.Module):
        """Wrong shards would be seen at inputs of 3 or more alone."""

        def __init__(self) -> None:
            super().__init__()
            self.high = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x >= 3, x * self.high, x)

    model, args = Guarded().eval(), (torch.tensor([[1.0, 2.0], [2.0, 0.0]]),)
    export(model, args, name="m", out=tmp_path, dynamic_shapes=({0: Dim("batch", min=1, max=8)},))
    alter_weight(tmp_path, 0)
    assert verify(model, args, None, tmp_path, "m").passed
    given = {"x": torch.tensor([[5.0, 1.0], [1.0, 2.0], [3.0, 9.0]])}
    result = verify(model, args, None, tmp_path, "m", inputs=given)
    assert not result.passed
    assert result.sizes[0] == {"batch": 3}
    for wrong, message in (({}, "input 'x' is missing"), ({"x": torch.ones(2, 2, dtype=torch.int64)}, "dtype float32")):
        with pytest.raises(InvalidInput, match=message):
            verify(model, args, None, tmp_path, "m", inputs=wrong)


class Logarithm(nn.Module):
    """NaN of negative elements, in `y` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.log(x) * self.scale, "z": x + self.scale}


PARTLY = "output 'y' is nan in 1 of 2 elements with fixed sizes, which says nothing of the shards"


@pytest.mark.parametrize(
    ("x", "passed", "said"),
    [
        ([[1.0, 0.0]], True, None),
        ([[1.0, -1.0]], True, PARTLY),
        ([[-1.0, -1.0]], False, "output 'y' is nan everywhere: nothing was compared"),
        ([[0.0, 0.0]], False, "output 'y' is infinite everywhere: nothing was compared"),
        ([[0.0, -1.0]], False, "output 'y' is nan or infinite everywhere: nothing was compared"),
    ],
)
def test_what_is_never_finite_was_not_compared(tmp_path: Path, x: list[list[float]], passed: bool, said: str) -> None:
    model, args = Logarithm().eval(), (torch.tensor(x),)
    export(model, args, name="m", out=tmp_path)
    result = verify(model, args, None, tmp_path, "m")
    assert (result.passed, result.parting, result.max_abs_error) == (passed, "", 0)
    assert (result.notes if passed else result.uncompared) == ((said,) if said else ())


def test_a_model_s_own_nan_is_named(tmp_path: Path) -> None:
    model, args = Logarithm().eval(), (torch.ones(1, 2),)
    model.scale.data[1] = math.nan
    export(model, args, name="m", out=tmp_path)
    result = verify(model, args, None, tmp_path, "m")
    assert result.passed
    assert result.notes[-1] == "the model holds nan itself: 'scale'"


class Looked(nn.Module):
    """Ids of 4 and more are out of range; of several rows, the last has one more than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids + ids.shape[0])


def test_what_the_model_itself_raises_is_told(tmp_path: Path) -> None:
    model, args = Looked().eval(), (torch.tensor([[0, 1], [1, 0]]),)
    shapes = {"ids": {0: Dim("batch", min=1, max=8)}}
    export(model, args, name="m", out=tmp_path, dynamic_shapes=shapes)
    result = verify(model, args, None, tmp_path, "m")
    assert result.passed
    assert result.sizes == ({"batch": 2}, {"batch": 1})
    assert result.notes[-1] == "with batch = 8 the model itself raises IndexError: index out of range in self"
    with pytest.raises(ExportError, match="with batch = 2 the model itself raises IndexError: index out of range"):
        verify(model, args, None, tmp_path, "m", inputs={"ids": torch.tensor([[9, 1], [1, 0]])})


class Replacing(nn.Module):
    """Puts another tensor in its buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("ring", torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.ring = torch.cat([self.ring[1:], y[:1]])
        return y + self.ring.mean(0)


def test_a_model_that_replaces_its_buffer_gets_it_back(tmp_path: Path) -> None:
    model, args = Replacing().eval(), (torch.randn(2, 8),)
    ring, before = model.ring, model.ring.clone()
    export(model, args, name="m", out=tmp_path, tensor_parallel=2, plan=Plan({"linear.*": "Shard(0)"}))
    result = verify(model, args, None, tmp_path, "m")
    assert result.passed
    assert result.max_abs_error < 1e-5
    assert model.ring is ring
    assert torch.equal(ring, before)


def test_the_errors_of_tensors() -> None:
    wanted = torch.tensor([1.0, -4.0, math.inf, math.nan])
    assert abs_error(wanted, wanted) == relative_error(wanted, wanted) == 0
    assert close(wanted, wanted, 0, 0)
    got = torch.tensor([1.0, -3.0, math.inf, math.nan])
    assert (abs_error(got, wanted), relative_error(got, wanted)) == (1, 0.25)
    assert abs_error(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf
    assert abs_error(torch.ones(2), torch.ones(3)) == abs_error(torch.ones(2), torch.ones(2).double()) == math.inf
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert abs_error(torch.ones(0), torch.ones(0)) == 0
    assert abs_error(torch.tensor([1, 5]), torch.tensor([1, 3])) == 2
    ids = torch.tensor([50000])
    assert not close(ids + 1, ids, 0.1, 0.1)  # another id, however large
    assert close(ids + 1, ids, 1, 0)
    assert not close(torch.ones(1) * 1.2, torch.ones(1), 0.1, 0.05)
    large = torch.tensor([2**60, -(2**63)])
    assert not close(large + 100, large, 99, 0)  # what a double doesn't tell apart
    assert close(large + 100, large, 100, 0)
    assert abs_error(torch.tensor([2**63 - 1, 0]), torch.tensor([-(2**63), 0])) == 2**64
    assert abs_error(torch.tensor([255], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8)) == 254
    assert abs_error(torch.tensor([True, False]), torch.tensor([True, True])) == 1
    ids = torch.tensor([2**64 - 1, 7], dtype=torch.uint64)
    assert abs_error(ids, torch.tensor([2**64 - 5, 7], dtype=torch.uint64)) == 4
    assert abs_error(ids, torch.tensor([0, 7], dtype=torch.uint64)) == 2**64
    assert abs_error(torch.tensor([1 + 1j]), torch.tensor([1 - 2j])) == 3
    assert relative_error(torch.tensor([3j]), torch.tensor([4j])) == 0.25
    assert close(torch.tensor([1 + 1j]), torch.tensor([1 + 1.05j]), 0.1, 0)
    assert close(torch.tensor([1000 + 1j]), torch.tensor([1000 + 1.05j]), 0, 0.001)  # of the magnitude
    assert not close(torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 0.1, 0.1)
    missing = torch.tensor([complex(math.nan, 1), complex(math.inf, 0)])
    assert close(missing, missing.clone(), 0, 0)
    assert abs_error(missing, missing.clone()) == 0
    assert not close(missing, torch.zeros(2) + 0j, 1, 1)
    assert close(torch.ones(1) * 1.14, torch.ones(1), 0.1, 0.05)


def test_npz_names_are_the_inputs(tmp_path: Path) -> None:
    """numpy has no bfloat16: its arrays come as two bytes each."""
    from shardserve.cli.commands.export import _inputs

    ids, half = np.array([[1, 2]]), torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    np.savez(tmp_path / "in.npz", ids=ids, half=half.view(torch.int16).numpy().view("V2"))
    found = _inputs(tmp_path / "in.npz")
    assert torch.equal(found["ids"], torch.tensor([[1, 2]]))
    assert torch.equal(found["half"], half)
    np.savez(tmp_path / "text.npz", ids=np.array(["a"]))
    with pytest.raises(InvalidInput, match="'ids', <U1, can't be a tensor"):
        _inputs(tmp_path / "text.npz")
