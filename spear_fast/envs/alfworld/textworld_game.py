"""A game on ALFWorld's real engine, textworld with Fast Downward: slow, needs the package's dependencies, off the loop.

Importing this module imports textworld and alfworld; only `engine: textworld` does.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from spear_fast.envs.base import Info, StepResult
from spear_fast.envs.game import GameEnv, Outcome
from spear_fast.errors import MissingDependencyError, TaskError

from .fast_game import UNLISTED
from .game_files import GameText, task_type_of

try:
    import textworld  # pyright: ignore[reportMissingImports]
    import textworld.envs.pddl.textgen as textgen  # pyright: ignore[reportMissingImports]
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv  # pyright: ignore[reportMissingImports]
    from textworld.logic import Rule  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    raise MissingDependencyError("textworld", "alfworld", f"task.params.engine=textworld ({missing})") from missing

_ENGINE = threading.RLock()
"""Held while the engine works: its parser and translator are global, and loading a game overwrites sys.argv."""
_idle: list[Any] = []
"""Engines of finished games. Each has a shared library of its own, which is never unloaded, so they are used again."""


class TextworldGame:
    """One game. Every method blocks; the environment calls them in a thread."""

    def __init__(self, text: GameText) -> None:
        """Raises TaskError if its goal is of no known task type."""
        self.task_type = task_type_of(text)
        with _ENGINE:
            cache_parsing()
            self._engine = _idle.pop() if _idle else AlfredDemangler(PddlEnv(request()))
            arguments = list(sys.argv)
            try:
                self._engine.load(text.data())
                self._state = self._engine.reset()
            finally:
                sys.argv[:] = arguments
        self._opening = self._seen = self._state.feedback
        self._is_closed = False

    def opening(self) -> str:
        """Return the welcome, what is seen, and the goal."""
        return self._opening

    def actions(self) -> list[str]:
        """Return the admissible commands without `help`, sorted."""
        return [command for command in self._state.admissible_commands if command != UNLISTED]

    def act(self, action: str) -> Outcome | None:
        """Carry out an admissible command."""
        if action not in self._state.admissible_commands:
            return None
        with _ENGINE:
            if self._is_closed:
                raise TaskError("the game was left while a step waited for the engine")
            self._state, score, done = self._engine.step(action)
        self._seen = self._state.feedback
        return Outcome(self._seen, float(score), won=bool(self._state.won), over=bool(done))

    def anchor(self) -> str:
        """Return the text last read."""
        return self._seen

    def expert(self) -> tuple[str, str]:
        """Return no thought and the first step of the engine's own plan. Raises TaskError if it finds none."""
        inner = self._engine.unwrapped
        with _ENGINE:
            plan = inner._pddl_state.replan(inner._entity_infos)
        if not plan:
            raise TaskError("the planner of the real engine finds no way to win the game")
        return "", plan[0]

    def close(self) -> None:
        """Leave the engine to the next game."""
        with _ENGINE:
            # A step that timed out may still wait for the engine, which another game will have by then.
            self._is_closed = True
            _idle.append(self._engine)


class TextworldEnv(GameEnv):
    """The environment of text games, in a thread: its steps take milliseconds to seconds of computing."""

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start game `options["index"]` of `options["split"]`. Raises TaskError if there is no such game."""
        return await asyncio.to_thread(asyncio.run, super().reset(seed=seed, options=options))

    async def step(self, text: str) -> StepResult:
        """Carry out the command in `text`; a message without a valid one changes nothing and costs the penalty."""
        return await asyncio.to_thread(asyncio.run, super().step(text))

    async def close(self) -> None:
        """Give the engine back."""
        game, self._game = self._game, None
        if isinstance(game, TextworldGame):
            await asyncio.to_thread(game.close)


def request() -> textworld.EnvInfos:
    """Return what a state of the engine shall tell."""
    return textworld.EnvInfos(admissible_commands=True, won=True)


@cache
def cache_parsing() -> None:
    """Let textworld parse each piece of grammar and each query once: an order of magnitude faster, equal output.

    Its texts are derived by parsing the same few dozen strings again at every step, and by deep copies of contexts
    whose values nobody changes.
    """
    parse = textgen._parse_and_convert
    parsed: dict[tuple[str, str], Any] = {}
    parse_query = Rule.parse_conjunctive_query
    queries: dict[str, Any] = {}

    def parse_once(text: str, rule_name: str = "symbols", **options: Any) -> Any:
        if (text, rule_name) not in parsed:
            parsed[text, rule_name] = parse(text, rule_name=rule_name, **options)
        # Symbols are given their context in place.
        return copy.deepcopy(parsed[text, rule_name])

    def parse_query_once(expr: str) -> Any:
        if expr not in queries:
            queries[expr] = parse_query(expr)
        return queries[expr]

    def copy_context(context: Mapping[str, Any]) -> dict[str, Any]:
        return {**context, "variables": dict(context["variables"]), "mapping": dict(context["mapping"])}

    textgen._parse_and_convert = parse_once
    textgen.copy_context = copy_context
    Rule.parse_conjunctive_query = staticmethod(parse_query_once)
