"""What an ALFWorld engine shows at a step, in the form in which engines are compared and traces are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from spear_fast.envs.alfworld.engine import Engine
from spear_fast.envs.alfworld.game_files import GameText


class Seen(NamedTuple):
    """All that a player can see."""

    text: str
    reward: int
    done: bool
    actions: Sequence[str]


def digest(actions: Sequence[str]) -> str:
    """Return a short text that differs between lists of commands."""
    return hashlib.sha256("\n".join(actions).encode()).hexdigest()[:16]


def fast_seen(text: GameText, engine: Engine) -> Seen:
    """What the fast engine shows at the beginning."""
    return Seen(text.fill(engine.opening()), 0, False, engine.actions())
