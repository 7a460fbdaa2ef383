"""Rows of math data sets, told apart by their columns, as prompt and right answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spear_fast.errors import TaskError

from .boxed import boxed_answer

QUESTION_COLUMNS = ("prompt", "problem", "question")
"""Columns with the question, in this order, in any case: DAPO-Math's, AIME's and MATH's, GSM8K's."""
ANSWER_COLUMNS = ("ground_truth", "answer", "solution")
"""Columns with the right answer, where there is no `reward_model.ground_truth`."""


def math_row(place: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with `prompt` and `ground_truth`, a text, beside its other columns.

    DAPO-Math's conversations of one user message become plain text. The answer of a worked solution is what follows its
    last "####" (GSM8K) or stands in its last box (MATH). Raises TaskError naming place and field.
    """
    # The first of columns that differ in case only.
    names = {name.lower(): name for name in reversed(list(record))}
    question = next((names[name] for name in QUESTION_COLUMNS if name in names), None)
    if question is None:
        raise _missing(place, "question", QUESTION_COLUMNS, record)
    field, reference = _reference(place, record, names)
    answer = _answer(place, field, reference)
    used = {question, "reward_model"}
    rest = {name: value for name, value in record.items() if name not in used}
    return {**rest, "prompt": _prompt(record[question]), "ground_truth": answer}


def _prompt(value: Any) -> Any:
    match value:
        case [{"role": "user", "content": str() as content}]:
            return content
    return value


def _reference(place: str, record: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, Any]:
    """The field that holds the right answer, and what it holds."""
    reward_model = record.get("reward_model")
    if reward_model is not None:
        if not isinstance(reward_model, Mapping) or reward_model.get("ground_truth") is None:
            raise TaskError(f"{place}: field 'reward_model' must be an object with 'ground_truth'")
        return "reward_model.ground_truth", reward_model["ground_truth"]
    for name in ANSWER_COLUMNS:
        if name in names and record[names[name]] is not None:
            return names[name], record[names[name]]
    raise _missing(place, "right answer", ("reward_model", *ANSWER_COLUMNS), record)


def _answer(place: str, field: str, reference: Any) -> str:
    is_number = isinstance(reference, int | float) and not isinstance(reference, bool) and math.isfinite(reference)
    if not isinstance(reference, str) and not is_number:
        raise TaskError(f"{place}: field {field!r} must be a text or a number, got {reference!r}")
    text = str(reference)
    answer = text.rpartition("####")[2] if "####" in text else boxed_answer(text) or text
    if not answer.strip():
        raise TaskError(f"{place}: field {field!r} holds no answer: {text[-60:]!r}")
    return answer.strip()


def _missing(place: str, what: str, names: tuple[str, ...], record: Mapping[str, Any]) -> TaskError:
    return TaskError(
        f"{place}: there is no {what}; name its column {' or '.join(map(repr, names))}; "
        f"the row has {', '.join(record) or 'no fields'}"
    )
