"""Operators that shards call whole, and those that are taken apart: each exported between two layers, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify
from shardserve.export.tracing import decompose

Function = Callable[[Tensor, Tensor], Tensor]

PLAN = Plan({"up.*": "Shard(0)", "other.*": "Shard(0)"})
CLASSES = torch.tensor([3, 1])
WINDOW = torch.hann_window(4)


class Between(nn.Module):
    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__()
        self.functions = dict(functions)
        self.up, self.other = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, z = self.up(x), self.other(x)
        return {name: function(y, z) for name, function in self.functions.items()}


def gram(y: Tensor) -> Tensor:
    return y.transpose(-1, -2) @ y + torch.eye(8)


OPERATORS: dict[str, dict[str, Function]] = {
    "fourier": {
        "fft_fftn": lambda y, z: torch.fft.fftn(y, dim=(1, 2)).real,
        "fft_rfftn": lambda y, z: torch.fft.irfftn(torch.fft.rfftn(y) * 2, s=y.shape[1:], dim=(1, 2)),
        "fft_ihfft": lambda y, z: torch.fft.hfft(torch.fft.ihfft(y)),
        "fft_fftshift": lambda y, z: torch.fft.ifftshift(torch.fft.fftshift(y).flip(-1)) * torch.fft.fftfreq(8),
        "stft": lambda y, z: torch.stft(y[:, 0], 4, window=WINDOW, return_complex=True).abs(),
        "istft": lambda y, z: torch.istft(
            torch.stft(y[:, 0], 4, window=WINDOW, return_complex=True), 4, window=WINDOW, length=8
        ),
    },
    "elements": {
        "broadcast_tensors": lambda y, z: torch.broadcast_tensors(y, z[:, :1])[1] + y,
        "index_fill": lambda y, z: y.index_fill(-1, CLASSES, 2.0),
        "angle": lambda y, z: torch.complex(y, z).angle(),
        "copysign": torch.copysign,
        "special": lambda y, z: torch.special.i0(y) + torch.special.expit(z) + torch.special.digamma(y.abs() + 1),
        "comparisons": lambda y, z: torch.clip(y.greater(z) * y.absolute(), 0.1) + y.isclose(z),
        "affine_grid": lambda y, z: F.affine_grid(
            y[:, 0, :6].view(-1, 2, 3), (y.shape[0], 1, 3, 3), align_corners=False
        ),
    },
    "linear_algebra": {
        "tensordot": lambda y, z: torch.tensordot(y, z[0], dims=([2], [1])),
        "linalg_inv": lambda y, z: torch.linalg.inv(gram(y)),
        "linalg_det": lambda y, z: torch.linalg.det(gram(y)) / 100 + torch.linalg.slogdet(gram(y)).logabsdet,
        "linalg_solve": lambda y, z: torch.linalg.solve(gram(y), z.transpose(-1, -2)),
        "linalg_cholesky": lambda y, z: torch.linalg.cholesky(gram(y)),
        "linalg_svdvals": lambda y, z: torch.linalg.svdvals(y),
        "linalg_eigvalsh": lambda y, z: torch.linalg.eigvalsh(gram(y)),
        "linalg_qr": lambda y, z: torch.linalg.qr(gram(y)).Q,
        "linalg_pinv": lambda y, z: torch.linalg.pinv(gram(y)),
        "matrix_exp": lambda y, z: torch.matrix_exp(gram(y) / 8),
    },
    "losses": {
        "mse_loss": lambda y, z: F.mse_loss(y, z),
        "huber_loss": lambda y, z: F.huber_loss(y, z, reduction="none"),
        "smooth_l1_loss": lambda y, z: F.smooth_l1_loss(y, z, beta=0.5),
        "l1_loss": lambda y, z: F.l1_loss(y, z),
        "cross_entropy": lambda y, z: F.cross_entropy(y[:, 0], CLASSES[:1].expand(y.shape[0])),
        "nll_loss": lambda y, z: F.nll_loss(y[:2, 0].log_softmax(-1), CLASSES, reduction="none"),
        "kl_div": lambda y, z: F.kl_div(y.log_softmax(-1), z.softmax(-1), reduction="batchmean"),
        "bce_with_logits": lambda y, z: F.binary_cross_entropy_with_logits(y, z.sigmoid()),
    },
    "statistics": {
        "quantile": lambda y, z: y.quantile(0.3, dim=-1) + y.nanquantile(0.6, dim=-1),
        "kthvalue": lambda y, z: y.kthvalue(3, dim=-1).values,
        "mode": lambda y, z: y.round().mode(dim=-1).values,
        "nansum": lambda y, z: y.log().nansum(-1) + y.log().nanmean(-1) + y.log().nanmedian(-1).values,
        "batch_norm": lambda y, z: F.batch_norm(y, None, None, training=True),
    },
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, dynamic = Between(OPERATORS[kind]), torch.randn(2, 3, 4), {"x": {0: Dim("batch", min=2, max=6)}}
    export(model, (x,), name="m", out=tmp_path, tensor_parallel=2, plan=PLAN, dynamic_shapes=dynamic)
    result = verify(model, (x,), None, tmp_path, "m", dynamic_shapes=dynamic, atol=1e-4, rtol=1e-4)
    assert result.passed, result


def test_whole_operators_stay_so() -> None:
    """Nothing is taken apart for operators that shards may call."""

    def traced(function: Function) -> torch.fx.Graph:
        dynamic = {"x": {0: Dim("batch", min=2, max=16)}}
        program = torch.export.export(Between({"y": function}), (torch.randn(8, 4),), dynamic_shapes=dynamic)
        return program.run_decompositions({}).graph

    assert not decompose.table(traced(lambda y, z: y.double().reshape(z.shape[0], 2, 4)))  # sizes, a check of a dtype
    assert not decompose.table(traced(lambda y, z: F.gelu(y).softmax(-1) @ z.transpose(-1, -2)))
    further = decompose.table(traced(lambda y, z: torch.tensordot(y, z.T, dims=1)))
    assert torch.ops.aten.tensordot.default in further
    assert torch.ops.aten.gelu.default not in further
    assert torch.ops.aten.linear.default not in further


def test_a_refusal_names_what_the_model_calls(tmp_path: Path) -> None:
    for function, message in (
        (lambda y, z: torch.linalg.eigh(gram(y))[1], r"_linalg_eigh\S* \(of linalg_eigh\) isn't one that a shard may"),
        (lambda y, z: F.dropout(y), r"native_dropout.* in evaluation mode its module"),
    ):
        with pytest.raises(ExportError, match=message):
            export(
                Between({"y": function}), (torch.randn(2, 3, 4),), name="m", out=tmp_path, tensor_parallel=2, plan=PLAN
            )


def test_a_norm_by_the_batch_s_own_statistics_stays_cut(tmp_path: Path) -> None:
    """And the running ones that it keeps lie on the ranks as the channels do."""
    norms = [nn.BatchNorm1d(8, track_running_stats=False), nn.BatchNorm1d(8)]
    model = nn.Sequential(nn.Linear(4, 8), norms[0], Training(norms[1]), nn.Linear(8, 4))
    plan = Plan({"0.*": "Shard(0)", "1.*": "Shard(0)", "2.norm.weight": "Shard(0)", "3.weight": "Shard(1)"})
    x = torch.randn(4, 4)
    report = export(model, (x,), name="m", out=tmp_path, tensor_parallel=2, plan=plan)
    assert dict(report.collectives()) == {"all_reduce": 1}
    assert not report.gathered
    result = verify(model, (x,), None, tmp_path, "m", atol=1e-4, rtol=1e-4)
    assert result.passed, result


class Training(nn.Module):
    """A norm that is in training mode in its model's evaluation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        return self.norm(x)  # type: ignore[no-any-return]
