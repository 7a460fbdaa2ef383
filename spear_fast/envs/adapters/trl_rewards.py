"""Reward functions in TRL's signature, called for one completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spear_fast.errors import ConfigError, TaskError

from ..prompt_rows import PromptRow
from .calls import Calls
from .locate import locate

NOT_HERE = ("completion_ids", "trainer_state")
"""What TRL's trainer also passes, and an environment does not know."""


class RewardFunctions:
    """Calls each function with lists of one element, and only with what it takes."""

    def __init__(self, locations: Sequence[str], weights: Sequence[float] | None) -> None:
        """Raises ConfigError for a function that is missing."""
        self._functions = [(location, locate("rewards", location)) for location in locations]
        self._weights = [1.0] * len(locations) if weights is None else list(weights)

    def check(self, row: PromptRow, *, has_environment: bool) -> None:
        """Raise ConfigError or TaskError if a function needs what `row` or this adapter does not give."""
        given = {"prompts", "completions", "log_extra", "log_metric", *row.columns}
        given |= {"environments"} if has_environment else set()
        for location, function in self._functions:
            for name in _required(function):
                if name in NOT_HERE:
                    raise ConfigError(
                        f"task.params.rewards: {location} needs {name!r}, which TRL's trainer has and a task has not; "
                        "give the parameter a default"
                    )
                if name not in given:
                    raise TaskError(
                        f"{row.place}: field {name!r} is missing, reward {location!r} needs it; "
                        f"the row has {', '.join(row.columns) or 'no other fields'}"
                    )

    async def scores(
        self, calls: Calls, place: str, prompt: Any, completion: Any, columns: Mapping[str, Any]
    ) -> list[tuple[float, Any]]:
        """Return weight and score, maybe None, of each function.

        `log_extra` and `log_metric` are taken and have no effect. Raises TaskError naming the function that failed.
        """
        one = {"prompts": prompt, "completions": completion, **columns}
        arguments = {**{name: [value] for name, value in one.items()}, "log_extra": _ignore, "log_metric": _ignore}
        found = []
        for (location, function), weight in zip(self._functions, self._weights, strict=True):
            try:
                scores = await calls.run(function, **accepted(function, arguments))
            except Exception as error:
                raise TaskError(f"reward {location!r} failed on {place}: {error!r}") from error
            if not isinstance(scores, Sequence) or len(scores) != 1:
                raise TaskError(
                    f"reward {location!r} gave {scores!r} on {place}; it must give one number per completion"
                )
            found.append((weight, scores[0]))
        return found


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `arguments` that `function` takes by name."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _required(function: Callable[..., Any]) -> list[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind not in variadic and each.default is each.empty]


def _ignore(*_: Any, **__: Any) -> None:
    """Take a value that only TRL's trainer could log."""
