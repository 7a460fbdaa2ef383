"""What an expert would compute by Python: code built from the question alone, checked against the answer."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from ..arithmetic import evaluate

_EXPRESSION = re.compile(r"[-0-9.(][-+*/()0-9. ]*[0-9)]")
_NAMED = {
    "gcd": re.compile(r"\b(?:GCD|greatest common divisor)\b", re.IGNORECASE),
    "lcm": re.compile(r"\b(?:LCM|least common multiple)\b", re.IGNORECASE),
}


def expert_code(question: str, answer: str) -> str | None:
    """Return Python code that computes `answer`, or None where the question does not simply say how.

    Known are arithmetic expressions and the GCD and LCM of listed numbers. The code comes from the question; the answer
    only tells whether that was understood.
    """
    for name, pattern in _NAMED.items():
        numbers = re.findall(r"-?\d+", question)
        if pattern.search(question) and str(getattr(math, name)(*map(int, numbers))) == answer:
            return f"import math\nprint(math.{name}({', '.join(numbers)}))"
    expression = max((each[0] for each in _EXPRESSION.finditer(question)), key=len, default="")
    try:
        is_understood = re.search(r"[-+*/]", expression) and evaluate(expression) == Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return None
    return f"print({expression})" if is_understood else None
