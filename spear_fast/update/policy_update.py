"""The update of one training step: on-policy mini-batches, and self-imitation beside or after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spear_fast.batching.minibatches import split
from spear_fast.seeds import derive_seed
from spear_fast.types import Row
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig

Stats = dict[str, float]


@dataclass(frozen=True)
class PolicyUpdate:
    """How the rows of a training step become optimizer steps.

    "separate_step" replays in optimizer steps of its own after the on-policy ones (the authors' code); "joint" adds
    the replayed rows to the on-policy steps, J = J_GRPO + weight * J_SIL (the paper's objective).
    """

    updater: Updater
    on_policy: PolicyLossConfig
    replayed: PolicyLossConfig
    stats: Literal["minibatch", "microbatch"]
    mode: Literal["separate_step", "joint"]
    mini_batch_size: int | None
    """Trajectories per optimizer step; None takes all."""
    epochs: int

    def run(
        self,
        rows: Sequence[Row],
        replay: Sequence[Row],
        replay_weight: float,
        seed: int,
        version: int | None = None,
    ) -> Stats:
        """Take all optimizer steps of a training step.

        Args:
            rows: On-policy rows.
            replay: Replayed rows with their recalibrated advantages; may be empty.
            replay_weight: gamma(step) * coef.
            seed: Of shuffles and draws.
            version: The policy's, where some rows come from older ones; see `LossGroup.version`.

        Returns:
            Means over the optimizer steps; `update/logp_gap_nats` is of the first one alone, where the weights are
            still those that sampled the rows.
        """
        steps = self._steps(rows, replay, replay_weight, seed, version)
        results = [
            self.updater.optimizer_step(groups, seed=derive_seed(seed, "draw", index))
            for index, groups in enumerate(steps)
        ]
        return _merged(results) | {"update/optimizer_steps": float(len(results))}

    def _steps(
        self, rows: Sequence[Row], replay: Sequence[Row], replay_weight: float, seed: int, version: int | None
    ) -> list[list[LossGroup]]:
        steps: list[list[LossGroup]] = []
        for epoch in range(self.epochs):
            for index in split(len(rows), self.mini_batch_size, derive_seed(seed, "split", epoch)):
                steps.append([LossGroup([rows[i] for i in index], self.on_policy, stats=self.stats, version=version)])
        if not replay or replay_weight == 0.0:
            return steps
        if self.mode == "joint" and steps:
            order = np.random.default_rng(derive_seed(seed, "replay")).permutation(len(replay))
            for groups, part in zip(steps, np.array_split(order, len(steps)), strict=True):
                if len(part):
                    groups.append(self._replay_group([replay[i] for i in part], replay_weight))
            return steps
        for index in split(len(replay), self.mini_batch_size, derive_seed(seed, "replay")):
            steps.append([self._replay_group([replay[i] for i in index], replay_weight)])
        return steps

    def _replay_group(self, rows: list[Row], weight: float) -> LossGroup:
        return LossGroup(rows, self.replayed, coef=weight, stats=self.stats, prefix="sil")


def _merged(results: Sequence[Stats]) -> Stats:
    """Mean of each statistic over the optimizer steps taken that report it; skipped ones have no finite numbers."""
    skipped = sum(result.get("update/skipped_steps", 0.0) for result in results)
    results = [result for result in results if not result.get("update/skipped_steps")]
    names = sorted({name for result in results for name in result})
    merged = {name: float(np.mean([result[name] for result in results if name in result])) for name in names}
    first = next((result["update/logp_gap_nats"] for result in results if "update/logp_gap_nats" in result), None)
    merged["update/skipped_steps"] = skipped
    return merged if first is None else merged | {"update/logp_gap_nats": first}
