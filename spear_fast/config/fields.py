"""The option surface as data: every dotted key with its type, default and description, read off the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from .schema import RunConfig

_TYPE_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "string",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
    "array": "list",
}
_BOUND_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Field:
    """One option or section, e.g. `Field("update.lr", "number > 0", "1e-06", "Learning rate ...", False)`."""

    key: str
    type: str
    default: str
    """JSON text of the default; "required" without one."""
    description: str
    is_section: bool


@cache
def all_fields() -> tuple[Field, ...]:
    """Return every section and option of RunConfig, each section before its options, in the schema's order."""
    return fields_of(RunConfig)


@cache
def fields_of(model: type[BaseModel]) -> tuple[Field, ...]:
    """Return the same of any pydantic model, e.g. the parameters of a task set."""
    schema = model.model_json_schema()
    return tuple(_walk(schema, schema.get("$defs", {}), ""))


@cache
def field_of(key: str) -> Field | None:
    """Return the field named by a dotted key, or None if there is none."""
    return next((field for field in all_fields() if field.key == key), None)


def _walk(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[Field]:
    required = section.get("required", ())
    for name, spec in section.get("properties", {}).items():
        reference = spec.get("$ref")
        key = prefix + name
        default = "required" if name in required else json.dumps(spec.get("default"))
        description = spec.get("description", "")
        if reference is None:
            yield Field(key, _type_text(spec), default, description, is_section=False)
        else:
            child = definitions[reference.rsplit("/", 1)[-1]]
            yield Field(key, "section", "", description or child.get("description", ""), is_section=True)
            yield from _walk(child, definitions, key + ".")


def _type_text(spec: Mapping[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(_type_text(choice) for choice in spec["anyOf"])
    if "const" in spec:
        return json.dumps(spec["const"])
    if "enum" in spec:
        return "one of " + ", ".join(json.dumps(choice) for choice in spec["enum"])
    if "prefixItems" in spec:
        return f"list of {len(spec['prefixItems'])}: " + ", ".join(_type_text(item) for item in spec["prefixItems"])
    bounds = [f"{sign} {spec[word]:g}" for word, sign in _BOUND_SIGNS.items() if word in spec]
    # Of models that are not ours: a class that stands among alternatives, and what may be anything.
    word = _TYPE_WORDS[spec["type"]] if "type" in spec else str(spec.get("$ref", "anything")).rsplit("/", 1)[-1]
    return " ".join([word, *([" and ".join(bounds)] if bounds else [])])
