"""The small grammar in which a shard's files write sizes: integers over the names of dynamic dims.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "//" | "%") factor)*
    factor     := INT | NAME | "-" factor | "(" expression ")" | ("min" | "max") "(" expression ("," expression)+ ")"
    condition  := conjunct ("or" conjunct)*      conjunct := comparison ("and" comparison)*
    comparison := expression ("==" | "!=" | "<=" | ">=" | "<" | ">") expression | "(" condition ")"

`//` and `%` round as Python's do; integers and results are of 64 bits. Text from a file is parsed, never evaluated as
Python.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

Tree = int | str | tuple["str | Tree", ...]
"""An integer, a dim's name, or (operator, operand, ...)."""

MAX_LENGTH = 2000
MAX_DEPTH = 40
MAX_OPERATORS = 200  # one after the other: a sum of 200 terms is a tree of that depth
MAX_INTEGER = 2**63 - 1
RESERVED = frozenset({"min", "max", "and", "or"})

_TOKEN = re.compile(r"\s*(?:([0-9]+|[A-Za-z_][A-Za-z0-9_]*|//|<=|>=|==|!=|[-+*%(),<>])|$)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

FUNCTIONS: Mapping[str, Callable[..., int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}
COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


class ExpressionError(ValueError):
    """Text that isn't in the grammar, a name that has no value, or a division by zero."""


@dataclass(frozen=True)
class Expression:
    """A parsed size or condition."""

    text: str
    tree: Tree
    names: frozenset[str]

    def evaluate(self, dims: Mapping[str, int]) -> int:
        """Its value with these sizes (a condition: 0 or 1); ExpressionError for a missing name, a zero divisor, or a
        value that 64 bits can't hold."""
        try:
            value = int(_evaluate(self.tree, dims))
        except KeyError as error:
            raise ExpressionError(f"'{self.text}': no value for {error}") from None
        except ZeroDivisionError:
            raise ExpressionError(f"'{self.text}': division by zero") from None
        if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
            raise ExpressionError(f"'{self.text}': its value is too large")
        return value


def is_name(text: str) -> bool:
    """Whether `text` may name a dim."""
    return _NAME.match(text) is not None and text not in RESERVED


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """The expression written in `text`."""
    parser = _Parser(text)
    tree = parser.expression()
    parser.end()
    return Expression(text, tree, frozenset(parser.names))


@lru_cache(maxsize=1024)
def parse_condition(text: str) -> Expression:
    """The condition written in `text`; its `evaluate` gives 1 where it holds."""
    parser = _Parser(text)
    tree = parser.condition()
    parser.end()
    return Expression(text, tree, frozenset(parser.names))


def evaluate(size: int | str, dims: Mapping[str, int]) -> int:
    """An entry of a TensorSpec's shape with these dims."""
    return size if isinstance(size, int) else parse(size).evaluate(dims)


def _evaluate(tree: Tree, dims: Mapping[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return dims[tree]
    symbol, operands = tree[0], tree[1:]
    assert isinstance(symbol, str)
    if symbol == "and":
        return all(_evaluate(operand, dims) for operand in operands)
    if symbol == "or":
        return any(_evaluate(operand, dims) for operand in operands)
    function = FUNCTIONS.get(symbol) or COMPARISONS[symbol]
    return function(*(_evaluate(operand, dims) for operand in operands))


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"an expression of {len(text)} characters; the limit is {MAX_LENGTH}")
        self.text, self.names, self.position, self.depth, self.operators = text, set[str](), 0, 0, 0
        self.tokens: list[str] = []
        start = 0
        while start < len(text):
            match = _TOKEN.match(text, start)
            if match is None:
                raise ExpressionError(f"'{text}': unexpected '{text[start:].strip()[:1]}'")
            start = match.end()
            if match[1] is not None:
                self.tokens.append(match[1])

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            self.position -= 1
            raise ExpressionError(f"'{self.text}': expected '{token}', found '{self.peek() or 'the end'}'")

    def end(self) -> None:
        if self.peek():
            raise ExpressionError(f"'{self.text}': unexpected '{self.peek()}'")

    def nested(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"an expression nested deeper than {MAX_DEPTH}")

    def applied(self) -> str:
        """Take an operator. Trees are walked by recursion, so one may have only so many."""
        self.operators += 1
        if self.operators > MAX_OPERATORS:
            raise ExpressionError(f"an expression of more than {MAX_OPERATORS} operators")
        return self.take()

    def expression(self) -> Tree:
        tree = self.term()
        while self.peek() in ("+", "-"):
            tree = (self.applied(), tree, self.term())
        return tree

    def term(self) -> Tree:
        tree = self.factor()
        while self.peek() in ("*", "//", "%"):
            tree = (self.applied(), tree, self.factor())
        return tree

    def factor(self) -> Tree:
        self.nested()
        try:
            token = self.take()
            if token.isdecimal():
                if len(token) > len(str(MAX_INTEGER)) or int(token) > MAX_INTEGER:
                    raise ExpressionError(f"'{self.text}': {token} is too large")
                return int(token)
            if token == "-":
                return ("-", 0, self.factor())
            if token == "(":
                tree = self.expression()
                self.expect(")")
                return tree
            if token in ("min", "max"):
                self.expect("(")
                operands = [self.expression()]
                while self.peek() == ",":
                    self.take()
                    operands.append(self.expression())
                self.expect(")")
                if len(operands) < 2:
                    raise ExpressionError(f"'{self.text}': {token} takes two or more operands")
                return (token, *operands)
            if is_name(token):
                self.names.add(token)
                return token
            raise ExpressionError(f"'{self.text}': unexpected '{token or 'end'}'")
        finally:
            self.depth -= 1

    def condition(self) -> Tree:
        return self.joined("or", lambda: self.joined("and", self.comparison))

    def joined(self, word: str, operand: Callable[[], Tree]) -> Tree:
        tree = operand()
        while self.peek() == word:
            tree = (self.applied(), tree, operand())
        return tree

    def comparison(self) -> Tree:
        # "(" opens an expression or a whole condition: try the expression first and come back if that fails.
        start, operators = self.position, self.operators
        self.nested()
        try:
            left = self.expression()
            symbol = self.take()
            if symbol not in COMPARISONS:
                raise ExpressionError(f"'{self.text}': expected a comparison, found '{symbol or 'the end'}'")
            return (symbol, left, self.expression())
        except ExpressionError:
            if start >= len(self.tokens) or self.tokens[start] != "(":
                raise
            self.position, self.operators = start + 1, operators
            tree = self.condition()
            self.expect(")")
            return tree
        finally:
            self.depth -= 1
