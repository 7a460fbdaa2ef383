"""The intrinsic reward R_tool for using tools, before its weight mu."""

from __future__ import annotations

from typing import Literal

from ..types import Trajectory

Variant = Literal["graded", "graded-negative"]
Count = Literal["tool_calls", "turns"]


def num_calls(trajectory: Trajectory, count: Count) -> int:
    """Return n_tool_calls: tool calls made, or turns taken for step-wise text games. Raises ValueError if unknown."""
    if count == "tool_calls":
        return trajectory.num_tool_calls
    if count == "turns":
        return len(trajectory.turns)
    raise ValueError(f"count={count!r} is unknown; use 'tool_calls' or 'turns'")


def graded(calls: int, per_call: float) -> float:
    """Return min(1, per_call * calls). Source: SPEAR (arXiv 2509.22601), tool-call reward."""
    return min(1.0, per_call * calls)


def graded_negative(calls: int, per_call: float, outcome: float) -> float:
    """Return 1[calls > 0] where the outcome is positive, else the graded reward.

    Source: the authors' reward of strong models: a success earns nothing by calling more often, while failures are
    still drawn towards calling.
    """
    if outcome > 0.0:
        return float(calls > 0)
    return graded(calls, per_call)


def intrinsic_reward(
    trajectory: Trajectory, outcome: float, *, variant: Variant, count: Count, per_call: float
) -> float:
    """Return R_tool of one trajectory whose outcome reward is `outcome`. Raises ValueError for an unknown variant."""
    calls = num_calls(trajectory, count)
    if variant == "graded":
        return graded(calls, per_call)
    if variant == "graded-negative":
        return graded_negative(calls, per_call, outcome)
    raise ValueError(f"variant={variant!r} is unknown; use 'graded' or 'graded-negative'")
