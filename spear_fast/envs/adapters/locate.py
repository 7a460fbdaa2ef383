"""Finds what a parameter names as `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from spear_fast.errors import ConfigError


def locate(field: str, location: str) -> Any:
    """Return the function or class at `package.module:name`, the value of `task.params.<field>`.

    Raises ConfigError naming the field and what could not be found.
    """
    source, colon, name = location.rpartition(":")
    if not colon:
        raise ConfigError(f"task.params.{field}={location!r} must have the form package.module:name")
    try:
        module = importlib.import_module(source)
    except ImportError as error:
        raise ConfigError(
            f"task.params.{field}={location!r}: {source!r} cannot be imported ({error}); install it or set PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"task.params.{field}={location!r}: {source} has no function or class {name!r}")
    return found
