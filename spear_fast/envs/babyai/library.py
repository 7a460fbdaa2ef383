"""Access to the minigrid package: imported late, quiet, levels by name."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from typing import Any

from spear_fast.config.nearest import nearest_key
from spear_fast.errors import ConfigError, MissingDependencyError


def make_level(name: str) -> Any:
    """Return a new `MiniGridEnv` of BabyAI level `name`, e.g. "GoToLocal", without gymnasium's wrappers.

    Raises MissingDependencyError without minigrid, ConfigError for a name that it does not have.
    """
    gymnasium = _import_gymnasium()
    versions = {match[1]: match[0] for match in map(_LEVEL.fullmatch, gymnasium.registry) if match}
    if name not in versions:
        raise ConfigError(
            f"task.params.levels: minigrid has no BabyAI level {name!r}; the nearest is "
            f"{nearest_key(name, sorted(versions))!r}"
        )
    return gymnasium.make(versions[name], disable_env_checker=True).unwrapped


def restart(env: Any, seed: int) -> Any:
    """Start the level that `seed` decides, without its own step limit; return the view's encoding."""
    observation, _ = env.reset(seed=seed)
    env.max_steps = sys.maxsize
    return observation["image"]


def digest(env: Any, with_agent: bool) -> str:
    """Return a hash of the grid and the mission, and of where the agent stands if asked for."""
    parts = [env.grid.encode().tobytes(), env.mission.encode()]
    if with_agent:
        parts.append(f"{env.agent_pos[0]},{env.agent_pos[1]},{env.agent_dir}".encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def make_bot(env: Any) -> Any:
    """Return minigrid's own expert for the present state of `env`."""
    return importlib.import_module("minigrid.utils.baby_ai_bot").BabyAIBot(env)


_LEVEL = re.compile(r"BabyAI-(\w+)-v\d+")


def _import_gymnasium() -> Any:
    # pygame, which minigrid imports for windows that are never opened, greets on import.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        importlib.import_module("minigrid")
        generation = importlib.import_module("minigrid.envs.babyai.core.roomgrid_level")
        gymnasium = importlib.import_module("gymnasium")
    except ImportError as error:
        raise MissingDependencyError("minigrid", "babyai", "the task set 'babyai'") from error
    # It prints each draw that it rejects. Redirecting stdout would catch what other threads print as well.
    vars(generation)["print"] = _say_nothing
    return gymnasium


def _say_nothing(*_: object) -> None:
    """Stand in for print."""
