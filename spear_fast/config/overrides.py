"""Dotted command-line overrides: `algo.replay.enabled=false` becomes nested settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spear_fast.errors import ConfigError

from .merge import merge
from .yaml_text import parse

SHORT_FOR = {"engine": "engine.name"}
"""Sections that may be set to a name."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the nested settings that `key=value` arguments stand for; a later one wins.

    Values are YAML: `seed=3`, `update.lr=1e-4`, `log.progress=off`, `update.betas=[0.9, 0.95]`; an empty value is
    null. Raises ConfigError naming every argument that cannot be read.
    """
    result: dict[str, Any] = {}
    problems: list[str] = []
    for argument in arguments:
        try:
            result = merge(result, _nested(argument))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _nested(argument: str) -> dict[str, Any]:
    key, equals, text = argument.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(
            f"override {argument!r} is not of the form key=value; write for example algo.replay.enabled=false"
        )
    value = parse(text, f"override {argument!r}")
    if key.strip() in SHORT_FOR and isinstance(value, str):
        parts = SHORT_FOR[key.strip()].split(".")
    nested: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        nested = {part: nested}
    return nested
