"""Where balanced cuts fall: by cost and by what crosses, at any depth, around what can't cross."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardserve.errors import ExportError
from shardserve.export import export, verify
from shardserve.export.layouts.balance import balance
from shardserve.export.tracing.trace import Trace, trace

from ..conftest import transformer


def traced(model: nn.Module, *args: Tensor) -> Trace:
    return trace(model, args, {}, None, None, None)


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(before, after) for before, after in pairwise(widths)))


def test_bytes_of_weights_are_balanced() -> None:
    model = chain(256, 256, 256, 256, 256, 2048, 256)  # the last two are as large as 16 of the others
    assert balance(traced(model, torch.randn(1, 256)), 2) == ("5",)
    assert balance(traced(chain(*[64] * 10), torch.randn(1, 64)), 3) == ("3", "6")


class Convolutions(nn.Module):
    """The first layers have the pixels, and so the FLOPs, the last one the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(32, 2000)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


def test_flops_are_balanced() -> None:
    assert balance(traced(Convolutions(), torch.randn(4, 32, 64, 64)), 2) == ("layers.2",)


class Level(nn.Module):
    """A level of a U-Net: down, what is inside, up again with what was before."""

    def __init__(self, inside: nn.Module, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.inside = inside
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((x, self.up(self.inside(self.down(x)))), 1))


def unet() -> nn.Module:
    return Level(Level(Level(nn.Identity(), 32), 16), 8)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_u_net_is_cut_inside_its_levels(stages: int, tmp_path: Path) -> None:
    model, image = unet().eval(), torch.randn(1, 8, 16, 16)
    report = export(model, (image,), name="u", out=tmp_path, pipeline_parallel=stages)
    assert len(report.cuts) == stages - 1
    assert any("." in name for name in report.cuts)
    # A skip connection crosses, too.
    assert max(len(stage.sends) for stage in report.stages) > 1
    assert verify(model, (image,), None, tmp_path, "u").passed


class Shared(nn.Module):
    """One layer that is called six times, as ALBERT's is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = chain(32, 64, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + self.layer(x)
        return x


def test_a_later_call_of_a_module_may_begin_a_stage(tmp_path: Path) -> None:
    model, x = Shared().eval(), torch.randn(64, 32)
    report = export(model, (x,), name="s", out=tmp_path, pipeline_parallel=2)
    assert report.cuts == ("layer@3",)
    assert verify(model, (x,), None, tmp_path, "s").passed
    assert [stage.parameter_bytes[0] for stage in report.stages] == [4 * (2 * 32 * 64 + 96)] * 2
    assert [len(stage.sends) for stage in report.stages] == [1, 1]


class Spectral(nn.Module):
    """What goes from `forth` to `back` is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.forth, self.back = nn.Linear(8, 8), Forth(), Back()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.back(self.forth(self.first(x))))


class Forth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


class Back(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(300, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(x * self.scale[0], n=8)


def test_what_cant_cross_moves_the_cut() -> None:
    model = traced(Spectral(), torch.randn(2, 8))
    # The load is most even at `back`, before which a complex tensor is alive.
    assert balance(model, 2) == ("forth",)
    with pytest.raises(
        ExportError, match=r"2 modules to cut at \('fft_rfft.*' can't cross a cut: it is complex64\); 4"
    ):
        balance(model, 4)


def test_a_deeper_module_only_where_it_pays_off() -> None:
    class Nested(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(chain(*[32] * (size + 1)) for size in sizes)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    x = torch.randn(4, 32)
    assert balance(traced(Nested(4, 4), x), 2) == ("parts.1",)
    assert balance(traced(Nested(30, 31), x), 2) == ("parts.1",)
    assert balance(traced(Nested(2, 6), x), 2) == ("parts.1.2",)


class Running(nn.Module):
    """Changes a buffer after it was read in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = chain(*[16] * 4), chain(*[16] * 4), chain(*[16] * 4)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.seen
        x = self.second(x)
        self.seen.copy_(x.sum(0))
        return self.last(x)


def test_a_buffer_is_read_and_changed_in_one_stage() -> None:
    model = traced(Running(), torch.randn(3, 16))
    assert balance(model, 2) == ("last",)
    with pytest.raises(ExportError, match="the buffer 'seen' is used before it and changed after it"):
        balance(model, 12)


def test_many_stages_of_many_modules() -> None:
    model = traced(chain(*[16] * 129), torch.randn(2, 16))
    assert balance(model, 8) == tuple(str(16 * stage) for stage in range(1, 8))


def test_fewer_bytes_cross() -> None:
    class Wide(nn.Module):
        """In the middle of each block four times as much is alive."""

        def __init__(self) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.Linear(16, 64) for _ in range(41))
            self.downs = nn.ModuleList(nn.Linear(64, 16) for _ in range(41))

        def forward(self, x: Tensor) -> Tensor:
            for up, down in zip(self.ups, self.downs, strict=True):
                x = down(up(x))
            return x

    assert balance(traced(Wide(), torch.randn(8, 16)), 2)[0].startswith("ups.2")


def test_tied_weights_count_in_both_stages() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embedding = nn.Embedding(400, 32)
            self.layers = chain(*[32] * 13)
            self.head = nn.Linear(32, 400, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layers(self.embedding(ids)))

    ids = torch.zeros(1, 4, dtype=torch.long)
    assert balance(traced(Tied(True), ids), 2) == balance(traced(Tied(False), ids), 2)


def test_too_few_modules() -> None:
    with pytest.raises(ExportError, match="the model has 1 module to cut at; 3 stages need 2: take at most 2"):
        balance(traced(chain(4, 4, 4), torch.randn(2, 4)), 3)


def test_the_example_s_transformer() -> None:
    model, args, options = transformer(blocks=6)
    whole = trace(model, args, {}, options["dynamic_shapes"], None, None)
    assert balance(whole, 3) == ("blocks.2", "blocks.4")


class Loops(nn.Module):
    """x [batch, 5, 32]: layers, then one loop over the positions after another."""

    def __init__(self, layers: int, loops: int) -> None:
        super().__init__()
        self.layers = chain(*[32] * (layers + 1))
        self.cells = nn.ModuleList(nn.GRUCell(32, 32) for _ in range(loops))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        for cell in self.cells:
            state, states = x.new_zeros(x.shape[0], 32), []
            for position in range(x.shape[1]):
                state = cell(x[:, position], state)
                states.append(state)
            x = torch.stack(states, 1)
        return x


@pytest.mark.parametrize(("layers", "loops", "cut"), [(0, 3, "cells.1"), (2, 1, "cells.0")])
def test_a_cut_is_beside_a_loop_rather_than_in_it(tmp_path: Path, layers: int, loops: int, cut: str) -> None:
    """In the middle of the loop it would be more even, but the loop's weights would lie in both stages."""
    model, x = Loops(layers, loops).eval(), torch.randn(2, 5, 32)
    report = export(model, (x,), name="m", out=tmp_path, pipeline_parallel=2)
    assert report.cuts == (cut,)
    assert sum(sum(stage.parameter_bytes) for stage in report.stages) == sum(p.nbytes for p in model.parameters())
    assert not report.warnings
    assert verify(model, (x,), None, tmp_path, "m").passed


def test_weights_that_lie_in_two_stages_are_named(tmp_path: Path) -> None:
    model, x = Loops(0, 1).eval(), torch.randn(2, 5, 32)
    report = export(model, (x,), name="m", out=tmp_path, pipeline_parallel=2, cuts=("cells.0@2",))
    assert report.warnings == (
        "weights that are used on both sides of a cut lie in each of those stages, 100% more bytes: "
        "cells.*.weight_ih, cells.*.weight_hh, cells.*.bias_ih, cells.*.bias_hh",
    )
    assert "warning: weights that are used" in str(report)
    assert verify(model, (x,), None, tmp_path, "m").passed
