"""The page of `shardserve inspect --html`: what is in it, and that nothing in it comes from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from shardserve.cli.page.page import page
from shardserve.shards.config import DimRange, Origin, ShardConfig, Signature, TensorSpec
from shardserve.shards.graph import Parameter
from shardserve.shards.summary import Collective, RankSummary, Sent, Summary

VOID = {"meta", "input", "br"}
NASTY = "<script>alert('x')</script>&\""


class Parsed(HTMLParser):
    """Elements with their attributes; every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def summary(
    ranks: int = 4, stages: int = 2, name: str = NASTY, weights: tuple[int, ...] = (300, 100, 200, 200)
) -> Summary:
    spec = TensorSpec(name, "float32", ("batch", 4))
    signature = Signature({"batch": DimRange(1, 8)}, (spec,), (spec,), ("batch != 7",))
    found: list[RankSummary] = []
    for rank in range(ranks):
        last = rank // (ranks // stages) == stages - 1
        config = ShardConfig(
            2, "id", "m", ranks, stages, rank, signature, (spec,), (spec,), "m.graph.json", "0" * 64,
            "weights.safetensors", "1" * 64, weights[rank % len(weights)],
            origins=() if last else (Origin(name, name, "Shard(1)"),),
            state=(TensorSpec("cache", "float32", (4, 4)),) * last,
        )  # fmt: skip
        parameters = (Parameter("p", f"layers.{rank % 2}.{name}", "float32", (5, 5)),)
        sent = Sent(spec, 32, None if last else config.origins[0])
        collectives = (Collective("all_reduce", 32), Collective("all_gather", 8))
        found.append(RankSummary(Path("d"), config, parameters, 7, collectives, (sent,), None if rank else 1_500_000))
    return Summary(tuple(found), {"batch": 2}, "the example's sizes")


def test_is_one_file_that_fetches_nothing() -> None:
    text = page(summary())
    parsed = Parsed(text)
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "a", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href", "style")
            assert name == "marker-end" or not re.search(r"url\(|https?:", value or "")
    assert not re.search(r"url\(|https?:|@import|fetch|import\(", text.replace('marker-end="url(#head)"', ""))
    assert parsed.all("meta")[2]["content"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in text


def test_names_are_text_only() -> None:
    parsed = Parsed(page(summary()))
    assert len(parsed.all("script")) == 1
    assert any(NASTY in text for text in parsed.texts)
    assert "alert" not in parsed.texts[-2]  # our own script


def test_the_picture_is_of_the_weights() -> None:
    parsed = Parsed(page(summary()))
    widths = [float(rect["width"] or 0) for rect in parsed.all("rect")]
    room = 400 - 16 - 2
    assert widths == pytest.approx([room * 0.75, room * 0.25, room * 0.5, room * 0.5], abs=0.1)
    titles = [text for text in parsed.texts if text.startswith("rank 0: ")]
    assert titles == ["rank 0: 300 B of weights, 1.5 M FLOPs, 7 operators"]
    assert len(parsed.all("line")) == 1
    assert "1 all_reduce, 1 all_gather a step: 40 B" in parsed.texts
    assert "1 tensor, 32 B" in parsed.texts


def test_many_ranks_stay_inside_the_picture_and_do_not_overlap() -> None:
    parsed = Parsed(page(summary(64, 1, "y", (100,))))
    boxes = [(float(rect["x"] or 0), float(rect["width"] or 0)) for rect in parsed.all("rect")]
    assert len(boxes) == 64
    for (x, width), (following, _) in pairwise(boxes):
        assert width > 2
        assert x + width <= following + 0.2
    assert boxes[-1][0] + boxes[-1][1] <= 400


def test_the_table_and_the_parameters() -> None:
    parsed = Parsed(page(summary(name="y")))
    texts = parsed.texts
    for wanted in (
        "FLOPs",
        "1.5 M",
        "unknown",
        "300 B",
        "layers.0.y",
        "layers.1.y",
        "0, 2",
        "1, 3",
        "200 B",
        "2 parameters",
    ):
        assert wanted in texts, wanted
    assert "of " in "".join(texts)
    assert "in parts, Shard(1)" in "".join(texts)
    assert "batch != 7" in texts
    rows = len(parsed.all("tr"))
    assert rows == 1 + 4 + 1 + 2
    (search,) = parsed.all("input")
    assert search["type"] == "search"
