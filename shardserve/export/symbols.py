"""From torch's symbolic sizes (sympy) to the shard format's expressions, and the dims that they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

from shardserve.errors import ExportError

Dim: TypeAlias = int | sympy.Expr
"""A size: an integer or an expression over the dims' symbols."""


def simplify(size: Any) -> Dim:
    """The integer or sympy expression behind an int, SymInt or expression."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    return _expanded(size) if isinstance(size, sympy.Basic) else int(size)


# Few expressions come again and again, from every operator and every placement that is tried.
@lru_cache(maxsize=65536)
def _expanded(size: sympy.Basic) -> Dim:
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def product(sizes: Any) -> Dim:
    """The product of sizes, expanded so that equal products compare equal."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return simplify(result)


def divide(size: Dim, parts: Dim) -> Dim | None:
    """size / parts where that is exact for all values of the dims, else None."""
    if isinstance(size, int) and isinstance(parts, int):
        return size // parts if size % parts == 0 else None
    return _divided(size, parts)


@lru_cache(maxsize=65536)
def _divided(size: Dim, parts: Dim) -> Dim | None:
    quotient = sympy.expand(sympy.cancel(sympy.sympify(size) / parts))
    above, below = sympy.fraction(sympy.together(quotient))
    if below != 1 or not above.is_polynomial(*above.free_symbols):
        return None
    return simplify(quotient)


class Printer:
    """Writes sizes and conditions in the grammar of shardserve.shards.expressions.

    Raises ExportError for what the grammar hasn't: sizes that depend on the data, and functions beyond
    + - * // % min max.
    """

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        self.names = names

    def size(self, size: Dim) -> int | str:
        """An entry of a TensorSpec's shape."""
        return size if isinstance(size, int) else self.expression(size)

    def shape(self, shape: tuple[Dim, ...]) -> tuple[int | str, ...]:
        return tuple(self.size(size) for size in shape)

    def expression(self, expr: sympy.Basic) -> str:
        """An integer expression."""
        if isinstance(expr, sympy.Integer):
            return str(int(expr))
        if isinstance(expr, sympy.Symbol):
            if expr not in self.names:
                raise ExportError(f"the size {expr} depends on the inputs' values, not on their shapes alone")
            return self.names[expr]
        if isinstance(expr, sympy.Add):
            return self._sum(expr)
        if isinstance(expr, sympy.Mul):
            return self._product(expr)
        if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and expr.exp > 0:
            return "*".join([self._operand(expr.base)] * int(expr.exp))
        kind, operands = type(expr).__name__, expr.args
        if kind in ("Max", "Min"):
            return f"{kind.lower()}({', '.join(self.expression(operand) for operand in operands)})"
        if kind in ("FloorDiv", "CleanDiv"):
            return f"{self._operand(operands[0])} // {self._operand(operands[1])}"
        if kind in ("Mod", "PythonMod"):
            return f"{self._operand(operands[0])} % {self._operand(operands[1])}"
        if kind == "CeilToInt" and type(operands[0]).__name__ == "IntTrueDiv":
            above, below = operands[0].args
            return f"-((0 - {self._operand(above)}) // {self._operand(below)})"
        if kind in ("TruncToInt", "FloorToInt") and type(operands[0]).__name__ == "IntTrueDiv":
            above, below = operands[0].args
            return f"{self._operand(above)} // {self._operand(below)}"
        raise ExportError(f"the size {expr} uses {kind}, which shards can't express")

    def condition(self, expr: sympy.Basic) -> str:
        """A condition on the dims."""
        symbols = {"Equality": "==", "Unequality": "!=", "LessThan": "<=", "GreaterThan": ">="}
        symbols |= {"StrictLessThan": "<", "StrictGreaterThan": ">"}
        kind = type(expr).__name__
        if kind in symbols:
            left, right = expr.args
            return f"{self.expression(left)} {symbols[kind]} {self.expression(right)}"
        if isinstance(expr, (sympy.And, sympy.Or)):
            word = " and " if isinstance(expr, sympy.And) else " or "
            return word.join(f"({self.condition(operand)})" for operand in expr.args)
        raise ExportError(f"the condition {expr} uses {kind}, which shards can't express")

    def _sum(self, expr: sympy.Add) -> str:
        text = ""
        # Positive terms first: "t - 1", not "-1 + t".
        for term in sorted(expr.args, key=lambda term: (term.could_extract_minus_sign(), term.is_number, str(term))):
            negative = term.could_extract_minus_sign()
            operand = self._operand(-term) if negative else self.expression(term)
            text += (" - " if text else "-") + operand if negative else (" + " if text else "") + operand
        return text

    def _product(self, expr: sympy.Mul) -> str:
        if expr.could_extract_minus_sign():
            return f"-{self._operand(-expr)}"
        above, below = expr.as_numer_denom()
        if below != 1:
            return f"{self._operand(above)} // {self._operand(below)}"
        return "*".join(self._operand(factor) for factor in expr.args)

    def _operand(self, expr: sympy.Basic) -> str:
        text = self.expression(expr)
        plain = isinstance(expr, sympy.Symbol) or (isinstance(expr, sympy.Integer) and expr >= 0)
        return text if plain else f"({text})"
