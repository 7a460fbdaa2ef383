"""The valid key a user most likely meant by an unknown one."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

_SAME_SECTION_BONUS = 0.25
"""What a candidate of the unknown key's own section gains: more than chance likeness, less than an equal name."""


def nearest_key(unknown: str, valid: Sequence[str]) -> str:
    """Return the entry of `valid` (dotted keys, at least one) closest to `unknown`.

    Similarity is the mean of two difflib ratios, of the whole keys and of their last parts, so that both a slip of
    the pen (`update.lrr`) and a forgotten section (`lr`, `replay.enabled`) find their key. Ties go to the first.
    """
    return max(valid, key=lambda candidate: _similarity(unknown, candidate))


def _similarity(left: str, right: str) -> float:
    left_section, _, left_name = left.rpartition(".")
    right_section, _, right_name = right.rpartition(".")
    whole = SequenceMatcher(None, left, right).ratio()
    last = SequenceMatcher(None, left_name, right_name).ratio()
    bonus = _SAME_SECTION_BONUS if left_section and left_section == right_section else 0.0
    return (whole + last) / 2 + bonus
