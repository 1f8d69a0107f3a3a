from __future__ import annotations

import pytest

from shardserve.shards.expressions import ExpressionError, evaluate, parse, parse_condition

DIMS = {"batch": 3, "length": 10}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("batch", 3),
        ("batch*length", 30),
        ("2 + batch * 4", 14),
        ("(2 + batch) * 4", 20),
        ("length - batch - 1", 6),
        ("length // batch", 3),
        ("-length // batch", -4),
        ("0 - (0 - length) // batch", 4),
        ("length % 4", 2),
        ("min(batch, length, 2)", 2),
        ("max(batch, length - 1)", 9),
        ("-(batch - 5)", 2),
    ],
)
def test_values(text: str, value: int) -> None:
    assert parse(text).evaluate(DIMS) == value
    assert evaluate(text, DIMS) == value


def test_names() -> None:
    assert parse("min(batch, 2) * length").names == {"batch", "length"}
    assert evaluate(5, {}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "batch +",
        "batch batch",
        "(batch",
        "batch)",
        "max(batch)",
        "min",
        "abs(batch)",
        "batch.__class__",
        "__import__('os')",
        "batch ** 2",
        "1.5",
        "batch / 2",
        "'a'",
        "batch if length else 1",
        "[1]",
        "batch == 2",
        "(" * 100 + "1" + ")" * 100,
        "1 + " * 2000 + "1",
        "1+" * 500 + "1",
        "-" * 500 + "1",
        "9223372036854775808",
        "9" * 2000,
        "٣",
        "bätch",
        "batch\x00",
    ],
)
def test_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


def test_missing_name_and_zero_divisor() -> None:
    with pytest.raises(ExpressionError, match="no value for 'width'"):
        parse("width + 1").evaluate(DIMS)
    with pytest.raises(ExpressionError, match="division by zero"):
        parse("length // (batch - 3)").evaluate(DIMS)


def test_a_value_that_64_bits_cannot_hold() -> None:
    huge = "*".join(["length"] * 100)
    assert parse(huge).evaluate({"length": 1}) == 1
    for text in (huge, f"0 - {huge}"):
        with pytest.raises(ExpressionError, match="its value is too large"):
            parse(text).evaluate(DIMS)


def test_the_largest_tree_can_be_evaluated() -> None:
    assert parse("+".join(["1"] * 201)).evaluate({}) == 201
    assert parse("(" * 38 + "+".join(["1"] * 201) + ")" * 38).evaluate({}) == 201
    assert parse_condition("(" * 38 + "+".join(["1"] * 200) + ")" * 38 + " == 200").evaluate({})


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("batch % 3 == 0", True),
        ("batch != 3", False),
        ("(batch + 1) * 2 <= 8", True),
        ("batch < 3 or length >= 10", True),
        ("batch < 3 and length >= 10", False),
        ("(batch == 3) and (length == 9 or length == 10)", True),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert parse_condition(text).evaluate(DIMS) == holds


@pytest.mark.parametrize("text", ["batch", "batch = 3", "batch == 3 and", "not batch == 3", "(batch == 3"])
def test_what_is_not_a_condition(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_condition(text)
