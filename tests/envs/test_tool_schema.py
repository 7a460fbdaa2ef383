"""Tool schemas: what the model is shown, and what its arguments are checked against."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, Optional

import pytest

from spear_fast.envs.docstrings import parse_docstring
from spear_fast.envs.tool_schema import LONGEST_SHOWN, ToolArgumentError, check_arguments, tool_schema
from spear_fast.errors import TaskError


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def forecast(
    city: str,
    days: int,
    copy: list[float],
    mode: Literal["short", "long"],
    unit: Unit = Unit.KELVIN,
    options: dict[str, int] | None = None,
    note: Optional[str] = None,  # noqa: UP045 (the old spelling must work too)
    strict: bool = False,
) -> str:
    """Tell the weather.

    It may rain: take care.

    Args:
        city: Where to
            look: any name.
        days (int): How many days.
        copy: Earlier values.
        mode: How much to tell.
        unit: Scale.
        options: More settings.
        note: Anything.
        strict: Whether to be strict.

    Returns:
        str: a sentence.
    """
    return f"{city} {days} {copy} {mode} {unit} {options} {note} {strict}"


class Counter:
    """An object with a tool."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int = 1) -> str:
        """Add to the total.

        Args:
            amount: How much.
        """
        self.total += amount
        return str(self.total)


def test_schema_of_every_type() -> None:
    assert tool_schema(forecast) == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "Tell the weather. It may rain: take care.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where to look: any name."},
                    "days": {"type": "integer", "description": "How many days."},
                    "copy": {"type": "array", "items": {"type": "number"}, "description": "Earlier values."},
                    "mode": {"type": "string", "enum": ["short", "long"], "description": "How much to tell."},
                    "unit": {
                        "type": "string",
                        "enum": ["celsius", "kelvin"],
                        "description": "Scale.",
                        "default": "kelvin",
                    },
                    "options": {
                        "anyOf": [
                            {"type": "object", "additionalProperties": {"type": "integer"}},
                            {"type": "null"},
                        ],
                        "description": "More settings.",
                    },
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "Anything."},
                    "strict": {"type": "boolean", "description": "Whether to be strict.", "default": False},
                },
                "required": ["city", "days", "copy", "mode"],
            },
        },
    }


def test_schema_is_the_callers_own_copy() -> None:
    tool_schema(forecast)["function"]["name"] = "changed"
    assert tool_schema(forecast)["function"]["name"] == "forecast"


def test_bound_method_has_no_self() -> None:
    assert list(tool_schema(Counter().add)["function"]["parameters"]["properties"]) == ["amount"]
    assert check_arguments(Counter().add, {"amount": "2"}) == {"amount": 2}


def test_arguments_are_converted_and_defaults_left_out() -> None:
    arguments = {"city": 12, "days": "3", "copy": [1, "2.5"], "mode": "long", "unit": "celsius", "note": None}
    checked = check_arguments(forecast, arguments)
    assert checked == {
        "city": "12",
        "days": 3,
        "copy": [1.0, 2.5],
        "mode": "long",
        "unit": Unit.CELSIUS,
        "note": None,
    }
    assert isinstance(checked["copy"][0], float)
    assert forecast(**checked).startswith("12 3")


GOOD: dict[str, Any] = {"city": "Ulm", "days": 1, "copy": [], "mode": "short"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"days": "many"}, "forecast: argument 'days': .*valid integer.*got \"many\""),
        ({"days": 1.5}, "argument 'days'.*got 1.5"),
        ({"mode": "medium"}, "argument 'mode': input should be 'short' or 'long', got \"medium\""),
        ({"unit": "rankine"}, "argument 'unit'.*'celsius' or 'kelvin'"),
        ({"copy": 3}, "argument 'copy'.*valid list, got 3"),
        ({"dayz": 1}, "unknown argument 'dayz', did you mean 'days'?"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolArgumentError, match=message):
        check_arguments(forecast, GOOD | change)


def test_every_missing_argument_is_named() -> None:
    with pytest.raises(ToolArgumentError, match="'days' is missing; argument 'copy' is missing"):
        check_arguments(forecast, {"city": "Ulm", "mode": "long"})


@pytest.mark.parametrize("arguments", [[1], "text", None, 3])
def test_arguments_must_be_an_object(arguments: Any) -> None:
    with pytest.raises(ToolArgumentError, match="must be a JSON object"):
        check_arguments(forecast, arguments)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ToolArgumentError) as caught:
        check_arguments(forecast, GOOD | {"days": "x" * 10_000})
    assert len(str(caught.value)) < 200 + LONGEST_SHOWN


def no_docstring(a: int) -> str:
    return str(a)


def no_annotation(a) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a)


def no_argument_line(a: int, b: int) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a + b)


def no_json_form(a: set[int]) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a)


def mixed_choices(a: Literal[b"x"]) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a)


def nested_without_json_form(a: list[bytes] | None) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a)


def many(*a: int) -> str:
    """Do it.

    Args:
        a: First.
    """
    return str(a)


def unknown_name(a: "Missing") -> str:  # noqa: F821, UP037
    """Do it.

    Args:
        a: First.
    """
    return str(a)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (no_docstring, "'no_docstring' has no docstring"),
        (no_annotation, "'no_annotation': parameter 'a' has no type annotation"),
        (no_argument_line, "'no_argument_line': parameter 'b' has no line under Args"),
        (no_json_form, "'no_json_form': parameter 'a' has type set.int., which has no JSON form"),
        (mixed_choices, "parameter 'a' has type typing.Literal"),
        (nested_without_json_form, "parameter 'a' has type <class 'bytes'>"),
        (many, "'many': parameter 'a' cannot be passed by name"),
        (unknown_name, "'unknown_name': its annotations cannot be read.*Missing"),
        (lambda a: a, "has no name"),
    ],
)
def test_unusable_tools_are_named(tool: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tool_schema(tool)


def test_docstring_without_sections() -> None:
    assert parse_docstring(None).summary == ""
    assert parse_docstring("One.\n\nTwo.").summary == "One. Two."
    assert parse_docstring("One.\n\nArgs:\n    *rest: All.\n").arguments == {"rest": "All."}
