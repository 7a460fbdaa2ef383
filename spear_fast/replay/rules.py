"""Who enters the replay buffer, who leaves it, when it is ripe, and what is drawn: pure functions."""

from __future__ import annotations

import numpy as np

from ..types import Trajectory


def admits(trajectory: Trajectory, advantage: float, require_tool_call: bool, part: int = 0) -> bool:
    """Return whether row `part` of a trajectory is worth storing: A > 0, and the policy acted validly.

    `advantage` is the mean over the row's action tokens. Acting validly means at least one valid tool call in the
    trajectory, or without `require_tool_call` (text games, whose actions are plain messages) at least one valid turn
    in the row.
    Source: SPEAR (arXiv 2509.22601), the buffer keeps A > 0; the tool call is the authors' code.
    """
    if require_tool_call:
        acted = trajectory.num_valid_tool_calls > 0
    else:
        acted = any(turn.action_valid for turn in trajectory.row_turns(part))
    return advantage > 0.0 and acted


def is_fresh(versions: np.ndarray, current_version: int, tolerate_steps: int) -> np.ndarray:
    """Return bool [R]: rows sampled at most `tolerate_steps` policy versions before `current_version`; int [R] in."""
    return current_version - versions <= tolerate_steps


def is_ripe(num_eligible: int, buffer_size: int, ripe_factor: float) -> bool:
    """Return whether more than ripe_factor * buffer_size rows are eligible."""
    return num_eligible > ripe_factor * buffer_size


def draw_indices(num_eligible: int, size: int, seed: int) -> np.ndarray:
    """Return min(size, num_eligible) distinct indices, ascending int64, uniform without replacement under `seed`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.sort(generator.permutation(num_eligible)[:size])
