"""Problems of the reasoning-gym library: access without its side effects, and safe scoring."""

from __future__ import annotations

import random
import sys
from typing import Any

from spear_fast.errors import ConfigError, MissingDependencyError


def create_generator(name: str, seed: int, **settings: Any) -> Any:
    """Return reasoning-gym's dataset `name`, whose item i depends on (settings, seed + i) and has no upper limit.

    Raises MissingDependencyError without the library, ConfigError if it refuses the settings.
    """
    create_dataset = _import_create_dataset()
    try:
        return create_dataset(name, seed=seed, size=sys.maxsize, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"reasoning-gym refuses {name!r} with {settings}: {error}; change task.params") from error


def draw_entry(dataset: Any, index: int) -> dict[str, Any] | None:
    """Return item `index`, or None where the generator itself fails (some divide by zero now and then)."""
    try:
        return dataset[index]
    except ArithmeticError:
        return None


def is_right(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    """Return whether the library's own scorer gives `answer` the full score of 1.

    Wrong answers can score above 0, and some scorers raise on malformed text; both count as wrong.
    """
    try:
        return float(dataset.score_answer(answer, entry)) == 1.0
    except Exception:
        return False


def _import_create_dataset() -> Any:
    # The import draws from Python's global generator; the state is put back, so that it cannot change a run.
    state = random.getstate()
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise MissingDependencyError("reasoning-gym", "envs", "this task set") from error
    finally:
        random.setstate(state)
    return create_dataset
