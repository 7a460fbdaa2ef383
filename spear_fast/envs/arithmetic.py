"""Exact arithmetic on expressions of + - * / and parentheses, as a calculator tool needs it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 200
"""Longest expression, in characters. It also bounds the depth of nesting."""
MAX_MAGNITUDE = 10**30
"""Largest absolute value of a number or of an intermediate result."""
SIGNIFICANT_DIGITS = 12
"""Digits shown of a result that is not a whole number."""

_ALLOWED = re.compile(r"[0-9.+\-*/() ]*")
_FUNCTIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
Operation = tuple[Fraction, str, Fraction]


def evaluate(expression: str) -> Fraction:
    """Return the exact value of `expression`.

    Raises ValueError, with a message for the model to read, for anything but numbers, + - * / and parentheses.
    """
    return operations(expression)[0]


def operations(expression: str) -> tuple[Fraction, list[Operation]]:
    """Return the value of `expression` and the two-operand operations that lead to it, in Python's order.

    A minus before a parenthesis counts as 0 - x. Example: "2 + 3 * 4" gives 14, [(3, "*", 4), (2, "+", 12)].
    Raises ValueError like `evaluate`.
    """
    trace: list[Operation] = []
    return _value(_parse(expression), trace), trace


def apply(left: Fraction, sign: str, right: Fraction) -> Fraction:
    """Return `left sign right` with sign one of + - * /. Raises ValueError on division by zero or overflow."""
    if sign == "/" and right == 0:
        raise ValueError("division by zero")
    return _bounded(_FUNCTIONS[sign](left, right))


def format_number(value: Fraction) -> str:
    """Return `value` as a whole number, or as a decimal of SIGNIFICANT_DIGITS digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.{SIGNIFICANT_DIGITS}g}"


def _parse(expression: str) -> ast.expr:
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_LENGTH} characters")
    # Without letters, neither names nor exponents such as 1e999 can occur.
    if not _ALLOWED.fullmatch(expression):
        raise ValueError("only numbers, + - * / and parentheses are allowed")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("the expression is not well formed") from error


def _value(node: ast.expr, trace: list[Operation]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            # repr gives back the decimal digits as written; the float itself would be inexact.
            return _bounded(Fraction(repr(number)))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, trace)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _negated(operand, trace)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _SIGNS:
            operation = (_value(left, trace), _SIGNS[type(sign)], _value(right, trace))
            trace.append(operation)
            return apply(*operation)
    raise ValueError("only numbers, + - * / and parentheses are allowed")


def _negated(operand: ast.expr, trace: list[Operation]) -> Fraction:
    value = _value(operand, trace)
    if not isinstance(operand, ast.Constant):
        trace.append((Fraction(0), "-", value))
    return -value


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("the number is too large")
    return value
