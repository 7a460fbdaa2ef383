"""Pydantic's findings as sentences: the key, the value, what was expected, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .fields import all_fields, field_of
from .nearest import nearest_key

_LONGEST_VALUE = 80
"""Characters of a wrong value that are shown."""


def describe_problems(error: ValidationError) -> list[str]:
    """Return one sentence for each problem found, in the order of the schema."""
    return [_sentence(detail) for detail in error.errors()]


def _sentence(detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key, detail["input"])
    if detail["type"] == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return f"{key}: {reason}" if key else reason
    if detail["type"] == "missing":
        return f"{key} is missing; set it, it must be {_expected(key, 'given')}"
    if detail["type"] == "string_pattern_mismatch":
        return f"{key}: got {_shown(detail['input'])}, expected text that matches {detail.get('ctx', {})['pattern']}"
    return f"{key}: got {_shown(detail['input'])}, expected {_expected(key, detail['msg'])}"


def _unknown_key(key: str, value: Any) -> str:
    # An override of an unknown section arrives as nested mappings; name the key as the user wrote it.
    while isinstance(value, Mapping) and len(value) == 1:
        ((name, value),) = value.items()
        key = f"{key}.{name}"
    nearest = nearest_key(key, [field.key for field in all_fields()])
    return f"unknown key {key!r}; the nearest valid key is {nearest!r}: rename or remove it"


def _expected(key: str, fallback: str) -> str:
    """Type of the option `key`, or of the list it is an element of."""
    field = field_of(key) or field_of(key.rpartition(".")[0])
    if field is None:
        return fallback
    return f"a section with keys such as {_some_keys(key)}" if field.is_section else field.type


def _some_keys(section: str) -> str:
    names = [field.key.removeprefix(section + ".") for field in all_fields() if field.key.startswith(section + ".")]
    return ", ".join([name for name in names if "." not in name][:3])


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
