"""Between the text of an action and gymnasium's action spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spear_fast.errors import ConfigError, TaskError


class Actions:
    """What the policy may write, and what the environment's `step` takes for it."""

    def __init__(self, space: Any, names: list[str] | dict[str, int] | None, key: str | None) -> None:
        """
        Args:
            space: `Discrete` or `Text`.
            names: Names of the actions of a `Discrete` space.
            key: Key of info that lists the valid commands of a `Text` space.

        Raises ConfigError naming what does not fit.
        """
        from gymnasium import spaces

        self._space = space
        self._key = key
        self._numbers: dict[str, int] | None = None
        if isinstance(space, spaces.Discrete):
            self._numbers = _numbered(space, names)
        elif not isinstance(space, spaces.Text):
            raise ConfigError(
                f"task.params.id: its action space is {space}; the adapter writes actions of Discrete and Text spaces, "
                "so wrap the environment in an ActionWrapper that has one of them"
            )
        elif names is not None:
            raise ConfigError("task.params.action_names is for Discrete action spaces, and this one is Text; remove it")
        # The default alphabet of Text has no space character: no one who leaves it so means to forbid that.
        self._any_character = isinstance(space, spaces.Text) and space.character_set == spaces.Text(1).character_set

    def names(self, info: Mapping[str, Any]) -> list[str] | None:
        """Return the commands that are valid now, None where that is not known.

        Raises TaskError if the environment's info lacks its key.
        """
        if self._key is not None:
            if self._key not in info:
                raise TaskError(f"info of the environment has no key task.params.actions_key={self._key!r}")
            return [str(command) for command in info[self._key]]
        return list(self._numbers) if self._numbers is not None else None

    def parse(self, text: str | None, info: Mapping[str, Any]) -> Any:
        """Return what `step` takes for a command, None if it is not understood.

        Names are compared without regard to case and repeated spaces; other text is handed on as it is.
        """
        if text is None:
            return None
        names = self.names(info)
        if names is not None:
            found = next((name for name in names if _plain(name) == _plain(text)), None)
            return found if self._numbers is None or found is None else self._numbers.get(found)
        fits = self._space.min_length <= len(text) <= self._space.max_length
        return text if fits and (self._any_character or self._space.contains(text)) else None


def _numbered(space: Any, names: list[str] | dict[str, int] | None) -> dict[str, int]:
    start, count = int(space.start), int(space.n)
    if names is None:
        raise ConfigError(
            f"task.params.action_names is missing: the action space is {space}; name its {count} actions in order"
        )
    if isinstance(names, list):
        if len(names) != count:
            raise ConfigError(f"task.params.action_names has {len(names)} names, the action space {space} {count}")
        names = {name: start + position for position, name in enumerate(names)}
    wrong = [name for name, number in names.items() if not start <= number < start + count]
    if wrong:
        raise ConfigError(f"task.params.action_names: {wrong[0]!r} is {names[wrong[0]]}, outside the space {space}")
    if not names or len({_plain(name) for name in names}) < len(names):
        raise ConfigError(f"task.params.action_names={list(names)} must hold different names, at least one")
    return names


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
