"""FLOPs of the operators that multiply matrices, from shapes alone: two for each multiplication and addition.

Everything else (elementwise, normalization, softmax, pooling) counts nothing here: its time is that of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from shardserve.export.symbols import Dim, simplify
from shardserve.export.symbols import product as _product

Shape: TypeAlias = tuple[Dim, ...]
Formula = Callable[[Sequence[Shape], Shape], Dim]

product = lru_cache(maxsize=65536)(_product)
"""The product of a shape's sizes; the same few shapes come again and again."""


def flops(opname: str, operands: Sequence[Shape], result: Shape, equation: str = "") -> Dim:
    """The FLOPs of one call of an ATen operator (without overload), 0 for one that multiplies no matrices.

    `operands` are the shapes of its tensors in the order of its schema, those of lists one after another; `result` is
    its (first) result's shape; `equation` is einsum's.
    """
    if opname == "einsum":
        return _einsum(equation, operands)
    formula = _FORMULAS.get(opname)
    return formula(operands, result) if formula is not None else 0


def _rows_times_contraction(index: int) -> Formula:
    """Each element of the result is a dot product as long as the last dim of operand `index`."""
    return lambda operands, result: product((2, *result, operands[index][-1]))


def _addbmm(operands: Sequence[Shape], result: Shape) -> Dim:
    return product((2, operands[1][0], *result, operands[1][-1]))


def _dot(operands: Sequence[Shape], result: Shape) -> Dim:
    return product((2, *operands[0]))


def _bilinear(operands: Sequence[Shape], result: Shape) -> Dim:
    """x1 [..., i], x2 [..., j], weight [o, i, j] → [..., o]."""
    return product((2, *operands[0][:-1], *operands[2]))


def _convolution(operands: Sequence[Shape], result: Shape) -> Dim:
    """weight [out, in / groups, *kernel]: each element of the result takes all but the first dim of it."""
    return product((2, *result, *operands[1][1:]))


def _transposed_convolution(operands: Sequence[Shape], result: Shape) -> Dim:
    """weight [in, out / groups, *kernel]: each element of the input goes into all but the first dim of it."""
    return product((2, *operands[0], *operands[1][1:]))


def _attention(operands: Sequence[Shape], result: Shape) -> Dim:
    """query [..., t, d], key [..., s, d], value [..., s, e]: scores and their product with the values.

    A causal mask doesn't halve it: what a kernel skips is its own affair.
    """
    query, key, value = operands[:3]
    return simplify(product((2, *query[:-1], key[-2], query[-1])) + product((2, *query[:-1], key[-2], value[-1])))


def _recurrent(operands: Sequence[Shape], result: Shape) -> Dim:
    """input [time, batch, width], states, weights and biases of all layers: each row goes through each matrix."""
    rows = operands[0][:-1]
    return simplify(sum(product((2, *rows, *shape)) for shape in operands[1:] if len(shape) == 2))


def _recurrent_cell(states: int) -> Formula:
    """input [batch, width], `states` of [batch, hidden], two matrices, biases."""

    def formula(operands: Sequence[Shape], result: Shape) -> Dim:
        batch = operands[0][0]
        return simplify(sum(product((2, batch, *shape)) for shape in operands[1 + states : 3 + states]))

    return formula


_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "inner"), _rows_times_contraction(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _rows_times_contraction(1)),
    **dict.fromkeys(("dot", "vdot"), _dot),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell(1)),
    "lstm_cell": _recurrent_cell(2),
    "addbmm": _addbmm,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _attention,
}


def _einsum(equation: str, operands: Sequence[Shape]) -> Dim:
    """Operands are contracted from the left, two at a time, as torch does without opt_einsum."""
    left, _, result = equation.replace(" ", "").partition("->")
    names = [_letters(part, len(shape)) for part, shape in zip(left.split(","), operands, strict=True)]
    sizes: dict[str, Dim] = {}
    for letters, shape in zip(names, operands, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            if size != 1 or letter not in sizes:
                sizes[letter] = size
    if "->" in equation:
        # As many dims as the longest "..." of the operands.
        kept = {letter for letter in sizes if letter.isdecimal() and "..." in result} | set(result.replace(".", ""))
    else:
        kept = {letter for letter in sizes if letter.isdecimal() or left.count(letter) == 1}
    total: Any = 0
    current = set(names[0])
    for index, letters in enumerate(names[1:], 1):
        together = current | set(letters)
        total += product((2, *(sizes[letter] for letter in sorted(together))))
        current = together & kept.union(*names[index + 1 :])
    return simplify(total)


def _letters(part: str, ndim: int) -> list[str]:
    """The letter of each dim; those of "..." are numbers, counted from the right as they broadcast."""
    before, dots, after = part.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *(str(number) for number in reversed(range(hidden))), *after]
