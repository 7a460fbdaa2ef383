"""The replay memory as the trainer sees it: offer what was trained on, draw what is worth repeating."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..types import Group, Row, split_row_uid
from .baseline import BaselineQueue, group_statistics
from .blocks import Block
from .buffer import ReplayBuffer
from .recalibrate import Mode, recalibrate_by_median, with_constant_advantage, with_scaled_advantages
from .rules import admits, draw_indices, is_fresh, is_ripe


class ReplayMemory:
    """Buffer, baseline FIFO and the rules between them (SPEAR, arXiv 2509.22601, self-imitation).

    A row is stored if A > 0 and it acted validly, dropped when older than `tolerate_steps` policy versions, and
    eligible if its recalibrated advantage A~ > 0 at the time of the draw. The second half of the dual filter comes
    before counting and drawing, as in the authors' code, so that a draw is never thinned afterwards.

    A trajectory may be several rows (see rollout/history.py). Each is admitted by its own advantage, which GiGPO sets
    apart from those of its siblings, then counted and drawn alone, as in the authors' text games; R is that of its
    trajectory.

    Numbers are those of the replay section of the configuration; `std_norm` is that of the on-policy advantage.
    `require_tool_call` must be False for tasks without tools. Raises ConfigError for a value out of range.
    """

    def __init__(
        self,
        *,
        buffer_size: int,
        baseline_size: int,
        tolerate_steps: int,
        ripe_factor: float,
        require_tool_call: bool,
        recalibrate: Mode,
        decay_weight: float,
        std_norm: bool,
    ) -> None:
        if buffer_size < 1:
            raise ConfigError(f"buffer_size={buffer_size} must be at least 1 row")
        if recalibrate not in ("p50", "decay", "none"):
            raise ConfigError(f"recalibrate={recalibrate!r} is unknown; use 'p50', 'decay' or 'none'")
        self._buffer = ReplayBuffer()
        self._baseline = BaselineQueue(baseline_size)
        self._buffer_size = buffer_size
        self._tolerate_steps = tolerate_steps
        self._ripe_factor = ripe_factor
        self._require_tool_call = require_tool_call
        self._recalibrate: Mode = recalibrate
        self._decay_weight = decay_weight
        self._std_norm = std_norm

    def offer(self, groups: list[Group], rows: list[Row]) -> dict[str, float]:
        """Take in a finished training step; called after its update, so that no row is replayed in its own step.

        `groups`: every group of the step, those that the group filter dropped included; their statistics enter D_R.
        `rows`: the rows the update used, with the advantages and old log-probs of that update; the admissible ones
        are stored. Returns `replay/` statistics. Raises ValueError for a row whose trajectory is not in `groups`.
        """
        self._baseline.push(*group_statistics(groups))
        trajectory_of = {trajectory.uid: trajectory for group in groups for trajectory in group.trajectories}
        origins = [split_row_uid(row.uid) for row in rows]
        unknown = [uid for uid, _ in origins if uid not in trajectory_of]
        if unknown:
            raise ValueError(f"rows uid={unknown[:5]} have no trajectory in the groups; offer both of the same step")
        block = Block.of_rows(rows)
        admitted = [
            admits(trajectory_of[uid], advantage, self._require_tool_call, part)
            for (uid, part), advantage in zip(origins, block.rows["advantage"].tolist(), strict=True)
        ]
        self._buffer.add(block.keep(np.array(admitted, dtype=bool)))
        return {
            "replay/admitted": float(sum(admitted)),
            "replay/size": float(len(self._buffer)),
            "replay/storage_bytes": float(self._buffer.num_bytes),
        }

    def draw(self, version: int, seed: int) -> tuple[list[Row] | None, dict[str, float]]:
        """Return the rows to replay now with A~ as their advantages, or None while the buffer is not ripe.

        `version` is the current policy version. Rows that are too old leave first. A draw takes at most `buffer_size`
        eligible rows, uniformly without replacement under `seed`, and empties the buffer; D_R stays. The statistics
        of `replay/` name the counts before the draw; means are given only for a draw.
        """
        self._buffer.keep(is_fresh(self._buffer.versions, version, self._tolerate_steps))
        recalibrated = self._recalibrated()
        eligible = np.flatnonzero(recalibrated > 0.0)
        stats = {
            "replay/size": float(len(self._buffer)),
            "replay/eligible": float(len(eligible)),
            "replay/drawn": 0.0,
        }
        if len(self._baseline):
            stats["replay/baseline_p50_reward"] = self._baseline.median_mean()
        if not is_ripe(len(eligible), self._buffer_size, self._ripe_factor):
            return None, stats
        chosen = eligible[draw_indices(len(eligible), self._buffer_size, seed)]
        stats["replay/drawn"] = float(len(chosen))
        stats["replay/advantage_mean"] = float(recalibrated[chosen].mean())
        stats["replay/age_mean_steps"] = float((version - self._buffer.versions[chosen]).mean())
        rows = [
            self._with_advantage(row, a) for row, a in zip(self._buffer.take(chosen), recalibrated[chosen], strict=True)
        ]
        self._buffer.clear()
        return rows, stats

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the buffer's and the baseline's arrays under "buffer." and "baseline."; numpy only, fit for npz."""
        parts = {"buffer": self._buffer.state_dict(), "baseline": self._baseline.state_dict()}
        return {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore `state_dict`. Raises CheckpointError if arrays are missing, unknown or do not fit each other."""
        parts: dict[str, dict[str, np.ndarray]] = {"buffer": {}, "baseline": {}}
        for key, array in state.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise CheckpointError(f"replay memory does not know the array {key!r}; resume from another checkpoint")
            parts[part][name] = array
        self._baseline.load_state_dict(parts["baseline"])
        self._buffer.load_state_dict(parts["buffer"])

    def _recalibrated(self) -> np.ndarray:
        """Return A~ of every stored row, float64 [R]; with "decay" and "none" the mean over its action tokens."""
        if self._recalibrate == "p50" and len(self._buffer):
            median_std = self._baseline.median_std() if self._std_norm else None
            return recalibrate_by_median(self._buffer.rewards, self._baseline.median_mean(), median_std)
        return self._buffer.advantages * self._scale

    @property
    def _scale(self) -> float:
        return self._decay_weight if self._recalibrate == "decay" else 1.0

    def _with_advantage(self, row: Row, advantage: float) -> Row:
        if self._recalibrate == "p50":
            return with_constant_advantage(row, advantage)
        return with_scaled_advantages(row, self._scale)
