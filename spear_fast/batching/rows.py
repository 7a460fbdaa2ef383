"""Trajectories to training rows."""

from __future__ import annotations

import numpy as np

from ..types import Group, Row, Trajectory, row_uid


def rows_from_groups(groups: list[Group]) -> list[Row]:
    """Return the rows of all trajectories that enter the loss, in the order of the groups.

    A trajectory gives one row, or as many as its `row_starts` say. Left out are unusable and filtered trajectories,
    rows without action tokens, and of each row what follows its last action token. `old_logp` is the sampler's.
    Raises ValueError if advantages are missing or token, mask and log-prob lists differ in length.
    """
    return [
        row
        for group in groups
        for trajectory in group.trajectories
        if trajectory.status.usable and trajectory.filtered is None and trajectory.num_action_tokens
        for row in _rows(trajectory)
    ]


def _rows(trajectory: Trajectory) -> list[Row]:
    if trajectory.advantages is None:
        raise ValueError(f"trajectory uid={trajectory.uid} has advantages=None; call advantages.fill before batching")
    lengths = [len(trajectory.tokens), len(trajectory.action_mask), len(trajectory.logps), len(trajectory.advantages)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"trajectory uid={trajectory.uid} has tokens, action_mask, logps, advantages of lengths {lengths}; "
            "all must have one entry per token"
        )
    return [
        _row(trajectory, trajectory.advantages, part, start, end)
        for part, (start, end) in enumerate(trajectory.row_spans)
        if any(trajectory.action_mask[start:end])
    ]


def _row(trajectory: Trajectory, advantages: np.ndarray, part: int, start: int, end: int) -> Row:
    # What the policy read after its last word conditions nothing.
    end -= trajectory.action_mask[start:end][::-1].index(True)
    return Row(
        uid=row_uid(trajectory.uid, part),
        group_id=trajectory.group_id,
        version=trajectory.version,
        tokens=np.array(trajectory.tokens[start:end], dtype=np.int32),
        action_mask=np.array(trajectory.action_mask[start:end], dtype=bool),
        old_logp=np.array(trajectory.logps[start:end], dtype=np.float32),
        advantages=np.array(advantages[start:end], dtype=np.float32),
        reward=trajectory.reward,
    )
