"""Models whose forward changes buffers: the shards keep them between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from shardserve.errors import ExportError, ShardError
from shardserve.export import Plan, Subgraph, cost, export, export_subgraphs, verify
from shardserve.export.sharding import cut
from shardserve.export.sharding.placements import Replicate
from shardserve.export.sharding.propagate import propagate
from shardserve.export.tracing.trace import trace
from shardserve.export.verification.running import Shards
from shardserve.shards.program import Program
from shardserve.shards.regions import find_regions, region_graph, replace_regions
from shardserve.shards.state import StateStore

WIDTH, HEADS, LONGEST = 16, 4, 12
PLAN = Plan({"blocks.*.[qkv].*": "Shard(0)", "blocks.*.o.weight": "Shard(1)"})


class Attention(nn.Module):
    """x [1, 1, 16] at `position` [1]; keys are written by an index, values by index_copy."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        shape = (1, HEADS, LONGEST, WIDTH // HEADS)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (each(x).view(1, 1, HEADS, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        self.keys[:, :, position] = k
        self.values.index_copy_(2, position, v)
        mask = torch.arange(LONGEST)[None] <= position[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return x + self.o(y.transpose(1, 2).reshape(1, 1, WIDTH))


class Decoder(nn.Module):
    """token int64 [1, 1] → scores [1, 1, 20]; counts its steps itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, 20)
        self.register_buffer("length", torch.zeros(1, dtype=torch.int64))

    def forward(self, token: Tensor) -> Tensor:
        x = self.embedding(token)
        for block in self.blocks:
            x = block(x, self.length)
        self.length += 1
        return self.head(x)


TOKENS = [torch.tensor([[token]]) for token in (3, 7, 1, 19, 7)]


def steps(run: Any) -> list[Tensor]:
    with torch.no_grad():
        return [run(token) for token in TOKENS]


def test_compiled_regions_keep_the_order_of_reads_and_writes(tmp_path: Path) -> None:
    for name, model, inputs in (("kinds", Kinds(), KINDS), ("decoder", Decoder(), TOKENS)):
        export(model, (inputs[0],), name=name, out=tmp_path / name)
        shards = Shards(tmp_path / name, name)
        ((program,),) = shards.stages
        regions = find_regions(program.graph, 0)
        assert regions
        alone = [fx.GraphModule(nn.Module(), region_graph(program.graph, 0, region)) for region in regions]
        runs = [lambda tensors, module=module: [x.clone() for x in module(*tensors)] for module in alone]
        forward = fx.GraphModule(nn.Module(), replace_regions(program.graph, 0, regions, runs)).forward
        program.compiled = lambda sizes, forward=forward: forward
        (spec,) = program.config.receives
        for x in inputs:
            with torch.no_grad():
                expected = model(x)
            for one, other in zip(shards.run({spec.name: x}), pytree.tree_leaves(expected), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_decoder_that_keeps_its_cache(tmp_path: Path, tp: int, pp: int) -> None:
    model = Decoder()
    plan = PLAN if tp > 1 else None
    report = export(
        model, (TOKENS[0],), name="decoder", out=tmp_path, plan=plan, tensor_parallel=tp, pipeline_parallel=pp
    )
    shards = Shards(tmp_path, "decoder")
    got = steps(lambda token: shards.run({"token": token})[0])
    for one, other in zip(got, steps(model), strict=True):
        torch.testing.assert_close(one, other)
    shards.reset()
    assert torch.equal(shards.run({"token": TOKENS[0]})[0], got[0])
    # Sharded by heads, written in place, each in its stage; the counter in all.
    caches = {f"blocks.{i}.{name}" for i in range(2) for name in ("keys", "values")}
    for stage in shards.stages:
        for program in stage:
            state = {spec.name: spec.shape for spec in program.config.state}
            own = caches if pp == 1 else {name for name in caches if f"blocks.{program.config.stage}." in name}
            assert state == dict.fromkeys(own, (1, HEADS // tp, LONGEST, WIDTH // HEADS)) | {"length": (1,)}
            assert program.copied == ("length",)
    assert sum(report.collectives().values()) == (2 if tp > 1 else 0)
    assert "stateful=True" in str(report)
    assert "keeps length: int64 [1]" in str(report)


class Ring(nn.Module):
    """Writes a row of a large buffer."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", first)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.rows.index_copy_(0, at, x)
        return x + 1


@pytest.mark.parametrize(("first", "copies"), [(torch.zeros(1000, 4), 1), (torch.ones(1000, 4).cumsum(0), 2)])
def test_the_memory_of_a_buffer_that_is_written_in_place(first: Tensor, copies: int) -> None:
    args = (torch.ones(1, 4), torch.tensor([3]))
    report = export(Ring(first), args, name="ring", out=None, tensor_parallel=None, ranks=1)
    (chosen,) = report.compared
    assert chosen.parameter_bytes == copies * 1000 * 4 * 4
    assert chosen.activation_bytes == 4 * 4 + 8 + 4 * 4


def test_a_write_costs_what_is_written() -> None:
    traced = trace(Decoder(), (TOKENS[0],), {}, None, None, None)
    writes = [node for node in traced.graph.nodes if "index_" in str(node.target)]
    assert len(writes) == 4
    position, row = 8, WIDTH * 4
    assert {cost.traced_operation(node, {}).bytes for node in writes} == {2 * (position + row)}
    graph = propagate(traced, dict.fromkeys(traced.tensors, Replicate()), cut.assign(traced, ()), 1, 0)
    local = [node for node in graph.nodes if "index_" in node.op]
    assert {cost.operation(node, graph.meanings()).bytes for node in local} == {2 * (position + row)}


def test_verify_takes_two_steps_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Decoder()
    model.length += 2
    model.blocks[0].values += 0.5
    export(model, (TOKENS[0],), name="decoder", out=tmp_path, plan=PLAN, tensor_parallel=2, pipeline_parallel=2)
    assert verify(model, (TOKENS[0],), None, tmp_path, "decoder").passed
    assert model.length.tolist() == [2]
    assert bool((model.blocks[0].values == 0.5).all())
    with torch.no_grad():
        model.blocks[1].keys += 1
    assert not verify(model, (TOKENS[0],), None, tmp_path, "decoder").passed


class Rebinding(nn.Module):
    """Puts another tensor in its buffer's place, where others write into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + x.sum(0)
        return self.total * 2


def test_verify_of_a_model_that_puts_other_tensors_in_its_buffers_places(tmp_path: Path) -> None:
    model, args = Rebinding(), (torch.randn(2, 4),)
    total = model.total
    export(model, args, name="m", out=tmp_path, dynamic_shapes=({0: Dim("batch", min=1, max=8)},))
    assert verify(model, args, None, tmp_path, "m").passed
    assert model.total is total
    assert not total.any()


class Kinds(nn.Module):
    """x [3, 4]: one buffer for each way to change it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up = nn.Linear(4, 8)
        for name in ("last", "before", "rolled", "corner", "sums", "picked", "biased"):
            self.register_buffer(name, torch.zeros(3, 8))
        self.biased = torch.arange(24.0).reshape(3, 8)
        self.register_buffer("seen", torch.zeros(5, 3, dtype=torch.bool))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.up(x)
        self.before.copy_(self.last)
        self.last.copy_(y)
        self.rolled[:, 1:] = self.rolled[:, :-1].clone()
        self.rolled[:, 0] = y[:, 0]
        self.corner[1:, 2:4] = y[1:, :2]
        self.sums += y
        self.picked[0] = y[2]
        self.picked.masked_fill_(self.picked < 0, 0.25)
        self.biased.mul_(0.5).add_(y)
        self.seen[0] = y.sum(1) > 0
        return self.before, self.rolled[:, ::2], self.corner + 1, self.sums.t(), self.picked[0], self.biased, self.seen


KINDS = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize("tp", [1, 2])
def test_all_ways_to_change_a_buffer(tmp_path: Path, tp: int) -> None:
    model = Kinds()
    plan = Plan({"up.*": "Shard(0)"}) if tp > 1 else None
    export(model, (KINDS[0],), name="kinds", out=tmp_path, plan=plan, tensor_parallel=tp)
    shards = Shards(tmp_path, "kinds")
    results = []
    for x in KINDS:
        got = shards.run({"x": x})
        with torch.no_grad():
            expected = model(x)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        results.append([(one, one.clone()) for one in got])
    # What was given stays as it is, whatever later steps write.
    assert all(torch.equal(one, then) for got in results for one, then in got)
    if tp == 1:
        # Read when it is written, written from itself, or between two writes; or what is written is no part.
        assert set(shards.stages[0][0].copied) == {"last", "before", "sums", "picked", "biased"}


class Old(nn.Module):
    """x [4]: what is written depends on what a part held before another write, of the same buffer or of another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(4, dtype=torch.bool))
        for name in ("current", "kept", "masked", "cleared", "previous"):
            self.register_buffer(name, torch.arange(8.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = torch.slice_scatter(self.kept, x, 0, 0, 4)
        self.kept.copy_(torch.slice_scatter(kept, self.kept[2:6], 0, 2, 6))
        masked = torch.slice_scatter(self.masked, x, 0, 0, 4)
        self.masked.copy_(torch.slice_scatter(masked, self.masked[2:6].masked_fill(x > 0, 7.0), 0, 2, 6))
        self.cleared[:4].masked_fill_(self.done, -5.0)
        self.done[:2] = x[:2] > 0
        self.cleared[5] = x[0]
        self.previous[:6] = self.current[2:]
        self.current[:4] = x
        return self.kept + 0, self.masked + 0, self.cleared + 0, self.previous + 0, self.current + 0


def test_a_write_in_place_takes_no_value_that_came_later(tmp_path: Path) -> None:
    model = Old()
    export(model, (torch.randn(4),), name="old", out=tmp_path)
    shards = Shards(tmp_path, "old")
    for seed in range(4):
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(tuple(shards.run({"x": x})), model(x))
    assert set(shards.stages[0][0].copied) == {"current", "kept", "cleared"}


class ChangesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2


class Mean(nn.Module):
    """x [batch, 3] → x and a mean over steps. how: the buffer's next value is assigned or written (or
    both), or the buffer is assigned before it is read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "assigned":
            self.mean = self.mean * 0.5 + x.mean(0)
        elif self.how == "written":
            self.mean.copy_(self.mean * 0.5 + x.mean(0))
        elif self.how == "both":
            self.mean = self.mean.mul_(0.5).add_(x.mean(0))
        else:
            self.mean = x.mean(0)
        return x + self.mean


@pytest.mark.parametrize(("how", "inner"), [("assigned", False), ("written", True), ("both", True), ("first", True)])
def test_buffers_that_are_assigned_or_written(tmp_path: Path, how: str, inner: bool) -> None:
    model = nn.Sequential(Mean(how)) if inner else Mean(how)
    steps = [torch.randn(4, 3) for _ in range(3)]
    export(model, (steps[0],), name="mean", out=tmp_path, input_names=["x"])
    shards = Shards(tmp_path, "mean")
    for x in steps:
        [y] = shards.run({"x": x})
        with torch.no_grad():
            torch.testing.assert_close(y, model(x))


def test_a_buffer_that_an_inner_module_assigns(tmp_path: Path) -> None:
    """torch.export takes it for a constant."""
    model = nn.Sequential(nn.Linear(3, 3), Mean("assigned"))
    with pytest.raises(ExportError, match=r"assigns its buffer '1\.mean'.* self\.mean\.copy_\(…\)"):
        export(model, (torch.ones(4, 3),), name="mean", out=tmp_path)


def test_a_model_that_changes_its_input(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"changes 'x' \(user input mutation\); a forward may change its buffers only"
    ):
        export(ChangesInput(), (torch.ones(2),), name="x", out=tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_buffers_of_another_export_are_not_shared(tmp_path: Path, equal: bool) -> None:
    for name in ("one", "other"):
        torch.manual_seed(0)
        model = Decoder()
        if name == "other" and not equal:
            model.head = nn.Linear(WIDTH, 20)
        export(model, (TOKENS[0],), name=name, out=tmp_path / name)
    store = StateStore()
    Program.load(tmp_path / "one" / "device0" / "one.graph.json", state=store)
    with pytest.raises(ShardError, match=r"another subgraph keeps a buffer '.*', too, and is of another export"):
        Program.load(tmp_path / "other" / "device0" / "other.graph.json", state=store)


class Outside(nn.Module):
    """What it counts is known by another object, too, as caches are that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.known = [torch.zeros(3, 4)]
        self.register_buffer("cache", self.known[0])

    def forward(self, x: Tensor) -> Tensor:
        self.known[0][0].copy_(x)
        return x + self.cache.sum(0)


def test_a_changed_tensor_that_is_no_buffer(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"changes a tensor of shape \[4\] that isn't one of its buffers \(aten.copy_"
    ):
        export(Outside(), (torch.ones(4),), name="outside", out=tmp_path)


def test_a_cache_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    executorch = pytest.importorskip("transformers.integrations.executorch")

    class Cached(executorch.TorchExportableModuleWithStaticCache):  # type: ignore[misc, name-defined]
        """Its cache's layers know the buffers under names of their own."""

        def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
            for i, layer in enumerate(self.static_cache.layers):
                layer.keys, layer.values = getattr(self, f"key_cache_{i}"), getattr(self, f"value_cache_{i}")
                layer.cumulative_length = getattr(self, f"cumulative_length_{i}")
            result: Tensor = super().forward(input_ids=input_ids, cache_position=cache_position)
            return result

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=32, **sizes)
    decoder = transformers.LlamaForCausalLM(config).eval()
    cache = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    decoder.generation_config = transformers.GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=16, cache_config=cache
    )
    model = Cached(decoder, batch_size=1, max_cache_len=16, device=torch.device("cpu"))
    length = Dim("length", min=2, max=15)
    ids = torch.tensor([[3, 5, 9, 11, 2]])
    prompt = {"input_ids": ids, "cache_position": torch.arange(5)}
    word = {"input_ids": ids[:, :1], "cache_position": torch.tensor([5])}
    shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
    column = {f"*.{name}_proj.weight": "Shard(0)" for name in ("q", "k", "v", "gate", "up")}
    plan = Plan({**column, "*.o_proj.weight": "Shard(1)", "*.down_proj.weight": "Shard(1)"})
    subgraphs = {"read": Subgraph((), prompt, shapes), "step": Subgraph((), word)}
    reports = export_subgraphs(model, subgraphs, name="llama", out=tmp_path, tensor_parallel=2, plan=plan)
    assert reports["step"].collectives() == {"all_reduce": 2}
    read = Shards(tmp_path / "read", "llama")
    step = Shards(tmp_path / "step", "llama", beside=read)
    assert all(program.copied == ("cumulative_length_0",) for program in step.stages[0])
    assert {spec.shape for spec in step.stages[0][0].config.state} == {(), (1, 1, 16, 8)}
    with torch.no_grad():
        got, wanted = read.run(prompt)[0], model(**prompt)
        for position in range(5, 9):
            torch.testing.assert_close(got, wanted)
            word = {"input_ids": wanted[:, -1].argmax(-1)[:, None], "cache_position": torch.tensor([position])}
            got, wanted = step.run(word)[0], model(**word)


class Means(nn.Module):
    """x [batch, 16]: keeps what is made by a layer that is cut, and what is made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("inner", torch.zeros(32))
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        self.inner.copy_(hidden.mean(0))
        self.seen.copy_(x.mean(0))
        return self.down(hidden)


def test_the_report_says_of_kept_buffers_how_they_lie(tmp_path: Path) -> None:
    report = export(Means(), (torch.ones(2, 16),), name="m", out=tmp_path, tensor_parallel=2)
    assert {spec.name: spec.shape for spec in report.stages[0].state} == {"inner": (16,), "seen": (16,)}
    assert report.replicated is not None
    assert [line for line in report.replicated if "seen" in line or "inner" in line] == [
        "seen (1.4%): what is written into it is whole"
    ]


class Overwritten(nn.Module):
    """Whole buffers take values of another dtype and of another shape, and are used afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(8, dtype=torch.int64))
        self.register_buffer("coarse", torch.zeros(3, 8, dtype=torch.bfloat16))
        self.register_buffer("rows", torch.zeros(3, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.whole.copy_(x[0] * 3)
        self.coarse.add_(1).copy_(x)
        self.rows.copy_(x.sum(0))
        return self.linear(self.rows), self.whole * 2, self.coarse.float(), self.rows + 0


def test_a_buffer_that_is_copied_into_keeps_its_dtype_and_shape(tmp_path: Path) -> None:
    """What read it after the copy had the source: unrounded, and of fewer rows."""
    net, example = Overwritten(), (torch.randn(3, 8),)
    export(net, example, name="m", out=tmp_path, tensor_parallel=2)
    result = verify(net, example, None, tmp_path, "m", atol=1e-6)
    assert result.passed, result
