"""The calculator's arithmetic: equal to Python's on every expression it accepts, and harmless on all others."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.envs.arithmetic import MAX_LENGTH, evaluate, format_number, operations

integers = st.integers(0, 999).map(str)
spaces = st.sampled_from(["", " "])


def compound(signs: str) -> st.SearchStrategy[str]:
    """Random expressions of the given operators, with parentheses and signs."""

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        binary = st.tuples(inner, spaces, st.sampled_from(signs), spaces, inner).map("".join)
        return binary | inner.map("({})".format) | inner.map("-({})".format) | inner.map("+{}".format)

    return st.recursive(integers, extend, max_leaves=8).filter(lambda text: len(text) <= MAX_LENGTH)


@given(compound("+-*"))
def test_whole_numbers_equal_pythons_eval(expression: str) -> None:
    assert evaluate(expression) == eval(expression)
    assert format_number(evaluate(expression)) == str(eval(expression))


@given(compound("+-*/"))
def test_division_is_exact(expression: str) -> None:
    fractions = re.sub(r"\d+", r"Fraction(\g<0>)", expression)
    try:
        expected = eval(fractions, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@given(compound("+-*"))
def test_operations_use_only_known_numbers_and_end_in_the_value(expression: str) -> None:
    value, trace = operations(expression)
    # Up to the sign, which a bare minus or plus changes without an operation.
    known = {0, *(int(number) for number in re.findall(r"\d+", expression))}
    last = None
    for left, sign, right in trace:
        assert {abs(left), abs(right)} <= known
        last = {"+": left + right, "-": left - right, "*": left * right}[sign]
        known.add(abs(last))
    assert abs(value) in known if last is None else value == last


def test_operations_follow_precedence_and_associativity() -> None:
    assert operations("2 + 3 * 4") == (14, [(3, "*", 4), (2, "+", 12)])
    assert operations("9 - 4 - 3") == (2, [(9, "-", 4), (5, "-", 3)])
    assert operations("-(1 + 2)") == (-3, [(1, "+", 2), (0, "-", 3)])


def test_decimals_are_taken_as_written() -> None:
    assert evaluate("0.1 + 0.2") == Fraction(3, 10)


@pytest.mark.parametrize(
    ("value", "text"),
    [(Fraction(7), "7"), (Fraction(-3), "-3"), (Fraction(1, 3), "0.333333333333"), (Fraction(5, 2), "2.5")],
)
def test_format(value: Fraction, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "__import__('os')",
        "abs(1)",
        "x",
        "1e999",
        "1_0",
        "[1]",
        "1 if 1 else 2",
        "5 % 3",
        "7 // 2",
        "1 < 2",
        "'a'",
        "(1)(2)",
        "1\n+2",
        "٣",
        "1,000",
        "",
        "   ",
        "1 +",
        "((1)",
        "1 2",
        "007",
        "1/0",
        "1/(2-2)",
        "9999999999 * 9999999999 * 9999999999 * 9999999999",
        "9" * 40,
        "1+" * 500 + "1",
        "(" * 150 + "1" + ")" * 150,
        "-" * 199,
    ],
)
def test_anything_else_is_a_short_value_error(expression: str) -> None:
    with pytest.raises(ValueError) as caught:
        evaluate(expression)
    assert 0 < len(str(caught.value)) < 80


def test_deepest_allowed_nesting_is_evaluated() -> None:
    assert evaluate("-" * (MAX_LENGTH - 1) + "1") == -1
    depth = (MAX_LENGTH - 1) // 2
    assert evaluate("(" * depth + "1" + ")" * depth) == 1


@given(st.text(alphabet="0123456789.+-*/() e_", max_size=30))
def test_random_text_never_raises_anything_but_value_error(expression: str) -> None:
    try:
        value = evaluate(expression)
    except ValueError:
        return
    assert isinstance(value, Fraction)
