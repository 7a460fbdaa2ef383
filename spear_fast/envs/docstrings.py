"""Reads a Google-style docstring: the summary and the text of each argument."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

_SECTIONS = ("Args", "Arguments", "Returns", "Yields", "Raises", "Example", "Examples", "Note", "Notes")
_HEADING = re.compile(rf"^({'|'.join(_SECTIONS)}):\s*$", flags=re.MULTILINE)
_ARGUMENT = re.compile(r"^\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True)
class Docstring:
    """What a docstring says, each text on one line, e.g. `Docstring("Add.", {"a": "First number."})`."""

    summary: str
    """Everything before the first section."""
    arguments: dict[str, str]


def parse_docstring(text: str | None) -> Docstring:
    """Return the parts of a Google-style docstring; empty parts where it has none."""
    parts = _HEADING.split(inspect.cleandoc(text or ""))
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    body = sections.get("Args", sections.get("Arguments", ""))
    return Docstring(_one_line(parts[0]), _arguments(inspect.cleandoc(body)))


def _arguments(body: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        # A deeper line continues the argument above, also when it holds a colon.
        match = _ARGUMENT.match(line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] = _one_line(f"{found[name]} {line}")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
