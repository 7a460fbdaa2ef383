"""YAML as users mean it, and errors that say where."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.config.yaml_text import dump, parse
from spear_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2e3),
        ("1.", 1.0),
        (".5", 0.5),
        ("3", 3),
        ("010", 10),
        ("0x1f", 31),
        ("-.inf", float("-inf")),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("1e", "1e"),
        ('"3"', "3"),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_read_as_expected(text: str, value: Any) -> None:
    found = parse(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_merge_keys_work() -> None:
    assert parse("base: &b {x: 1, y: 2}\nover:\n  <<: *b\n  y: 3\n", "here")["over"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsteps: 2\nseed: 3\n", r"here, line 3, column 1: the key 'seed' stands twice"),
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("a: [1", "here, line 1"),
        ("3: x", "the key 3 is not a string; put it in quotes"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "here, line 2"),
        ("a: \x00", "here"),
    ],
)
def test_what_cannot_be_read_is_located(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "here")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=plain | st.from_regex(r"[-+0-9eE._xo:]{1,6}", fullmatch=True))
def test_dump_is_read_back(value: Any) -> None:
    """Also strings that look like numbers, and shared values, which need no aliases."""
    text = dump({"value": value, "again": value})
    assert parse(text, "here") == {"value": value, "again": value}


def test_not_a_number_is_read_back() -> None:
    assert isnan(parse(dump({"value": float("nan")}), "here")["value"])
