"""Training steps to fill a replay storage with: rows of drawn lengths, their trajectories and groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Row, Task, Trajectory, Turn

TOKEN_BYTES = 4 + 1 + 4 + 4
"""Of one token as it is offered: id int32, mask bool, log-prob float32, advantage float32."""
ROW_BYTES = 6 * 8
"""Of one row: uid, group, version, length, reward and mean advantage."""
_VOCAB_SIZE = 151_936
_POOL_TOKENS = 1 << 20
_TASK = Task("replay", "train", 0, seed=0)


@dataclass(frozen=True)
class Load:
    """How many trajectories, in how many training steps, and how long they are."""

    trajectories: int = 1_000_000
    steps: int = 50
    group: int = 16
    shortest: int = 4
    mean_tokens: float = 20.0
    longest: int = 64
    seed: int = 0

    @property
    def per_step(self) -> int:
        """Rows of a step, whole groups."""
        return max(1, self.trajectories // self.steps // self.group) * self.group

    @property
    def stored(self) -> int:
        """Rows after all steps."""
        return self.per_step * self.steps


@dataclass
class Step:
    """One finished training step, as `ReplayMemory.offer` takes it; every row is admissible."""

    groups: list[Group]
    rows: list[Row]


class Steps:
    """Makes steps: step k is the same whoever asks. Rows are views of one pool of random tokens."""

    def __init__(self, load: Load) -> None:
        self._load = load
        rng = np.random.default_rng(derive_seed(load.seed, "pool"))
        self._tokens = rng.integers(0, _VOCAB_SIZE, _POOL_TOKENS, dtype=np.int32)
        self._logps = -rng.exponential(0.5, _POOL_TOKENS).astype(np.float32)
        # The mask of a row that has `prompt` tokens before its action begins at longest - prompt.
        self._mask = np.arange(2 * load.longest) >= load.longest
        self._ones = np.ones(load.longest, dtype=np.float32)

    def make(self, index: int) -> Step:
        """Step `index`, whose rows were sampled by policy version `index`."""
        load, count = self._load, self._load.per_step
        lengths = self._lengths(index)
        rng = np.random.default_rng(derive_seed(load.seed, "step", index))
        prompts = np.minimum((lengths * rng.uniform(0.1, 0.5, count)).astype(np.int64), lengths - 1)
        starts = rng.integers(0, _POOL_TOKENS - load.longest, count)
        rewards = rng.choice([0.1, 0.5, 1.0, 1.5], count, p=[0.3, 0.2, 0.3, 0.2])
        groups = [Group(group, _TASK, []) for group in range(count // load.group)]
        rows = []
        for place, (length, prompt, start, reward) in enumerate(
            zip(lengths.tolist(), prompts.tolist(), starts.tolist(), rewards.tolist(), strict=True)
        ):
            group, uid = place // load.group, index * count + place
            rows.append(self._row(uid, group, index, length, prompt, start, reward))
            made = Trajectory(_TASK, group, place % load.group, uid, index, reward=reward, num_valid_tool_calls=1)
            made.turns = [Turn(prompt, length)]
            groups[group].trajectories.append(made)
        return Step(groups, rows)

    def payload_bytes(self, index: int) -> int:
        """Bytes of what there is to store of step `index`, without any overhead."""
        return int(self._lengths(index).sum()) * TOKEN_BYTES + self._load.per_step * ROW_BYTES

    def _lengths(self, index: int) -> np.ndarray:
        """Long-tailed lengths of a step's rows, int64 [R]."""
        load = self._load
        rng = np.random.default_rng(derive_seed(load.seed, "lengths", index))
        drawn = load.shortest + rng.exponential(load.mean_tokens - load.shortest, load.per_step)
        return np.minimum(drawn, load.longest).astype(np.int64)

    def _row(self, uid: int, group: int, version: int, length: int, prompt: int, start: int, reward: float) -> Row:
        begin = self._load.longest - prompt
        mask = self._mask[begin : begin + length]
        return Row(
            uid=uid,
            group_id=group,
            version=version,
            tokens=self._tokens[start : start + length],
            action_mask=mask,
            old_logp=self._logps[start : start + length],
            advantages=self._ones[:length] * mask,
            reward=reward,
        )
