"""TRL's two kinds of tools: plain functions, and the public methods of an environment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from spear_fast.errors import ConfigError

from .locate import locate
from .recorded_tools import Recording, recorded

NOT_TOOLS = ("reset", "get_reward")
"""Public methods of an environment that the policy does not see."""


def function_tools(locations: Sequence[str]) -> list[Callable[..., Any]]:
    """Return the functions at `package.module:name` as recorded tools. Raises ConfigError for one that is missing."""
    return [_function_tool(locate("tools", location)) for location in locations]


def environment_tools(environment: Any, location: str) -> list[Callable[..., Any]]:
    """Return the public methods of an environment's class as recorded tools, in the order of their names.

    Raises ConfigError if it has no `reset`.
    """
    kind = type(environment)
    methods = dict(inspect.getmembers(kind, predicate=inspect.isfunction))
    if "reset" not in methods:
        raise ConfigError(f"task.params.environment={location!r}: {kind.__name__} has no method reset; add one")
    public = {name: method for name, method in methods.items() if not name.startswith("_") and name not in NOT_TOOLS}
    return [recorded(name, method, _method_of_owner(name), is_method=True) for name, method in public.items()]


def _function_tool(function: Callable[..., Any]) -> Callable[..., Any]:
    return recorded(function.__name__, function, lambda _: function, is_method=False)


def _method_of_owner(name: str) -> Callable[[Recording], Callable[..., Any]]:
    return lambda recording: getattr(recording.owner, name)
