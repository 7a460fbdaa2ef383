"""Tools for the model: a typed Python function as an OpenAI function schema, and its arguments checked."""

from __future__ import annotations

import copy
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from spear_fast.config.nearest import nearest_key
from spear_fast.errors import TaskError

from .docstrings import parse_docstring

_PLAIN_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}

LONGEST_SHOWN = 60
"""Characters of a wrong argument that are quoted back to the model."""


class ToolArgumentError(ValueError):
    """The arguments of a tool call do not fit; the text is meant for the model that made the call."""


def tool_schema(tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the OpenAI function schema of a typed function with a Google-style docstring.

    Types: str, int, float, bool, list, list[T], dict, dict[str, T], Literal, Enum, Optional and unions of them.
    Parameters with a default are not required. Raises TaskError naming the tool and the parameter that lacks an
    annotation or a docstring line, or has a type without a JSON form.
    """
    return copy.deepcopy(_described(*_target(tool)).schema)


def check_arguments(tool: Callable[..., Any], arguments: Any) -> dict[str, Any]:
    """Return the JSON `arguments` of a call, converted to the types of the tool's parameters.

    Conversions are those of pydantic's lax mode ("3" and 3.0 to 3), and numbers to text. Raises ToolArgumentError with
    one sentence for each missing, unknown or wrong argument, TaskError if the tool itself has no schema.
    """
    target = _described(*_target(tool))
    if not isinstance(arguments, Mapping):
        raise ToolArgumentError(f"{target.name}: arguments must be a JSON object, got {_shown(arguments)}")
    try:
        checked = target.model.model_validate(dict(arguments))
    except ValidationError as error:
        problems = [_sentence(detail, target) for detail in error.errors()]
        raise ToolArgumentError(f"{target.name}: {'; '.join(problems)}") from None
    # Arguments left out are left to the function's own defaults.
    return {name: getattr(checked, alias) for name, alias in target.fields.items() if alias in checked.model_fields_set}


@dataclass(frozen=True)
class _Tool:
    name: str
    schema: dict[str, Any]
    model: type[BaseModel]
    """Checks and converts the arguments."""
    fields: dict[str, str]
    """The field of `model` that each parameter stands in."""


def _target(tool: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """The function itself and whether its first parameter is bound: what all environments share, so it is cached."""
    function = getattr(tool, "__func__", tool)
    return function, function is not tool


@cache
def _described(function: Callable[..., Any], bound: bool) -> _Tool:
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise TaskError(f"tool {function!r} has no name; define it with def")
    parameters, hints = _signature(name, function, bound)
    docstring = parse_docstring(function.__doc__)
    if not docstring.summary:
        raise TaskError(f"tool {name!r} has no docstring; its first sentence tells the model what the tool does")
    properties: dict[str, Any] = {}
    for parameter in parameters:
        text = docstring.arguments.get(parameter.name)
        if not text:
            raise TaskError(f"tool {name!r}: parameter {parameter.name!r} has no line under Args: in the docstring")
        properties[parameter.name] = _property(name, parameter, hints[parameter.name], text)
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    schema = {
        "type": "function",
        "function": {
            "name": name,
            "description": docstring.summary,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    return _Tool(name, schema, *_arguments_model(name, parameters, hints))


def _signature(name: str, function: Callable[..., Any], bound: bool) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Parameters a call may name, and their resolved types."""
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1 if bound else 0 :]
    except (NameError, TypeError, ValueError) as error:
        raise TaskError(
            f"tool {name!r}: its annotations cannot be read ({error}); import the types they name"
        ) from error
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TaskError(f"tool {name!r}: parameter {parameter.name!r} cannot be passed by name; declare plain ones")
        if parameter.name not in hints:
            raise TaskError(f"tool {name!r}: parameter {parameter.name!r} has no type annotation; add one")
    return parameters, hints


def _property(tool: str, parameter: inspect.Parameter, annotation: Any, text: str) -> dict[str, Any]:
    try:
        schema = {**_json_type(annotation), "description": text}
    except TypeError as error:
        raise TaskError(
            f"tool {tool!r}: parameter {parameter.name!r} has type {error}, which has no JSON form"
        ) from None
    if parameter.default not in (parameter.empty, None):
        default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
        schema["default"] = default
    return schema


def _json_type(annotation: Any) -> dict[str, Any]:
    """JSON schema of a type. Raises TypeError(annotation) if there is none."""
    if annotation in _PLAIN_TYPES:
        return {"type": _PLAIN_TYPES[annotation]}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _choices(annotation, [member.value for member in annotation])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _choices(annotation, list(arguments))
    if origin is list:
        return {"type": "array", "items": _json_type(arguments[0])}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _json_type(arguments[1])}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_json_type(choice) for choice in arguments]}
    raise TypeError(annotation)


def _choices(annotation: Any, values: list[Any]) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    if not kinds <= _PLAIN_TYPES.keys() - {list, dict}:
        raise TypeError(annotation)
    schema: dict[str, Any] = {"enum": values}
    return {"type": _PLAIN_TYPES[kinds.pop()], **schema} if len(kinds) == 1 else schema


def _arguments_model(
    name: str, parameters: list[inspect.Parameter], hints: dict[str, Any]
) -> tuple[type[BaseModel], dict[str, str]]:
    """A pydantic model of the parameters, and its field for each of them.

    The fields have neutral names with the parameters as aliases: pydantic refuses names such as `copy` or `_x`.
    """
    fields = {parameter.name: f"argument_{position}" for position, parameter in enumerate(parameters)}
    definitions: dict[str, Any] = {}
    for parameter in parameters:
        default = ... if parameter.default is parameter.empty else parameter.default
        definitions[fields[parameter.name]] = (hints[parameter.name], Field(default, alias=parameter.name))
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    return create_model(name, __config__=config, **definitions), fields


def _sentence(detail: ErrorDetails, tool: _Tool) -> str:
    """One finding of pydantic, as the model shall read it."""
    argument = str(detail["loc"][0])
    if detail["type"] == "missing" and len(detail["loc"]) == 1:
        return f"argument {argument!r} is missing"
    if detail["type"] == "extra_forbidden":
        hint = f"did you mean {nearest_key(argument, list(tool.fields))!r}?" if tool.fields else "the tool takes none"
        return f"unknown argument {argument!r}, {hint}"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return f"argument {argument!r}: {message}, got {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
