"""Answers that need no computer algebra: equal text, integers and plain decimals."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_SPACES = re.compile(r"\\[,!;: ]|\\quad|[ \t\n]|(?<=[0-9])\{,\}(?=[0-9])")


_APART = re.compile(r"[0-9]\s+[0-9]")
"""Two numbers, a mixed fraction say, that are one without the space."""


def compare_plain(reference: str, answer: str) -> bool | None:
    """Return whether two answers are equal, or None where that takes computer algebra.

    Dollar signs around a formula, spaces and thousands separators do not matter: "$1{,}234.50$" is 1234.5.
    """
    if _APART.search(reference) or _APART.search(answer):
        return True if reference.strip() == answer.strip() else None
    left, right = _normalised(reference), _normalised(answer)
    if left == right:
        return True
    numbers = _number(left), _number(right)
    if None in numbers:
        return None
    return numbers[0] == numbers[1]


def _normalised(text: str) -> str:
    text = text.strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) >= len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)]
    return _SPACES.sub(lambda match: "," if match[0] == "{,}" else "", text.replace("\u2212", "-"))


def _number(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text) or not any(character in "0123456789" for character in text):
        return None
    return Decimal(text.replace(",", ""))
