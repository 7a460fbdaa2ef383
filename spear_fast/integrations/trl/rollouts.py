"""TRL's completions as trajectories: which tokens are turns, how many tools were called, what does not decode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from spear_fast.types import Status, Task, Trajectory, Turn

CALLS, VALID_CALLS = "num_tool_calls", "num_valid_tool_calls"
"""Keys under which a `rollout_func` may return its own counts, one int per completion."""


class ToolWatch:
    """Counts the tool calls of each rollout that returned and did not raise."""

    def __init__(self, num_rollouts: int) -> None:
        self.valid = [0] * num_rollouts

    def wrap(self, tools: Sequence[dict[str, Callable[..., Any]]]) -> None:
        """Replace the functions of rollout i, `tools[i]`, by ones that count for it; in place."""
        for rollout, by_name in enumerate(tools):
            for name, tool in by_name.items():
                by_name[name] = self._counted(tool, rollout)

    def _counted(self, tool: Callable[..., Any], rollout: int) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(tool):

            @wraps(tool)
            async def call_later(*args: Any, **kwargs: Any) -> Any:
                result = await tool(*args, **kwargs)
                self.valid[rollout] += 1
                return result

            return call_later

        @wraps(tool)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = tool(*args, **kwargs)
            self.valid[rollout] += 1
            return result

        return call


def runs(mask: Sequence[int], value: int) -> list[tuple[int, int]]:
    """The maximal runs of `value` in `mask` as (start, end), end exclusive. Example: [1, 0, 0, 1], 0 gives [(1, 3)]."""
    found, start = [], None
    for place, entry in enumerate([*mask, not value]):
        if entry == value and start is None:
            start = place
        elif entry != value and start is not None:
            found.append((start, place))
            start = None
    return found


def trajectories_of(
    completion_ids: list[list[int]],
    tool_mask: list[list[int]] | None,
    completions: list[Any],
    extra: dict[str, Any],
    watch: ToolWatch | None,
    decode: Callable[[list[int]], str],
) -> list[Trajectory]:
    """One trajectory per completion, its tokens those of the completion alone.

    Turns are the runs of 1 in `tool_mask`. Tool calls: with `watch` (TRL ran the tools) those in the messages, and as
    valid those it counted; else what the rollout function returned as `num_tool_calls` and `num_valid_tool_calls`; else
    the runs of 0 in `tool_mask`, all of them valid. `decode` turns ids into text.
    """
    made = []
    for index, ids in enumerate(completion_ids):
        mask = [1] * len(ids) if tool_mask is None else tool_mask[index]
        if watch is not None:
            calls, valid = _calls_in(completions[index]), watch.valid[index]
        else:
            calls = int(extra[CALLS][index]) if CALLS in extra else len(runs(mask, 0))
            valid = int(extra[VALID_CALLS][index]) if VALID_CALLS in extra else calls
        trajectory = Trajectory(Task("trl", "train", index, seed=0), group_id=0, sample=0, uid=index, version=0)
        trajectory.tokens, trajectory.action_mask = list(ids), [bool(entry) for entry in mask]
        trajectory.turns = [Turn(start, end) for start, end in runs(mask, 1)]
        trajectory.num_tool_calls, trajectory.num_valid_tool_calls = calls, valid
        trajectory.readable = all("\ufffd" not in decode(ids[turn.start : turn.end]) for turn in trajectory.turns)
        made.append(trajectory)
    return made


def number(trajectories: list[Trajectory], round_index: int, group_size: int) -> None:
    """Give the trajectories of one round, in order and of all ranks, their version, group, sample and uid."""
    for index, trajectory in enumerate(trajectories):
        trajectory.version = round_index
        trajectory.uid = round_index * len(trajectories) + index
        trajectory.group_id, trajectory.sample = divmod(trajectory.uid, group_size)


def set_outcomes(trajectories: list[Trajectory], outcomes: list[float | None]) -> None:
    """Set the outcome reward of each; one that no reward function could score, None, leaves the round."""
    for trajectory, outcome in zip(trajectories, outcomes, strict=True):
        trajectory.outcome_reward = 0.0 if outcome is None else outcome
        trajectory.status = Status.ENV_ERROR if outcome is None else Status.OK


def _calls_in(messages: Any) -> int:
    """Tool calls that the assistant's messages of a completion hold."""
    if isinstance(messages, str):
        return 0
    return sum(len(message.get("tool_calls") or ()) for message in messages)
