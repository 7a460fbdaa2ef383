"""Trajectories to training rows."""

from __future__ import annotations

import numpy as np

from ..types import Group, Row, Trajectory


def rows_from_groups(groups: list[Group]) -> list[Row]:
    """Return one row per trajectory that enters the loss, in the order of the groups.

    Left out are unusable and filtered trajectories and those without action tokens, and of each trajectory what
    follows its last action token. `old_logp` is the sampler's.
    Raises ValueError if advantages are missing or token, mask and log-prob lists differ in length.
    """
    return [
        _row(trajectory)
        for group in groups
        for trajectory in group.trajectories
        if trajectory.status.usable and trajectory.filtered is None and trajectory.num_action_tokens
    ]


def _row(trajectory: Trajectory) -> Row:
    if trajectory.advantages is None:
        raise ValueError(f"trajectory uid={trajectory.uid} has advantages=None; call advantages.fill before batching")
    lengths = [len(trajectory.tokens), len(trajectory.action_mask), len(trajectory.logps), len(trajectory.advantages)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"trajectory uid={trajectory.uid} has tokens, action_mask, logps, advantages of lengths {lengths}; "
            "all must have one entry per token"
        )
    # What the policy read after its last word conditions nothing.
    end = len(trajectory.action_mask) - trajectory.action_mask[::-1].index(True)
    return Row(
        uid=trajectory.uid,
        group_id=trajectory.group_id,
        version=trajectory.version,
        tokens=np.array(trajectory.tokens[:end], dtype=np.int32),
        action_mask=np.array(trajectory.action_mask[:end], dtype=bool),
        old_logp=np.array(trajectory.logps[:end], dtype=np.float32),
        advantages=np.array(trajectory.advantages[:end], dtype=np.float32),
        reward=trajectory.reward,
    )
