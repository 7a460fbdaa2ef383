"""Supervised learning on demonstrations, step by step: what the cold start and `spear-fast sft` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spear_fast.config.schema import RunConfig
from spear_fast.seeds import derive_seed
from spear_fast.types import Row
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig

if TYPE_CHECKING:
    from spear_fast.update.model import PackedModel

IMITATION = PolicyLossConfig(kind="reinforce", aggregation="token-mean")
"""With advantage 1 on the expert's tokens, REINFORCE is the negative log-likelihood."""

DemoRows = Sequence[Row]
"""The rows of one demonstration."""


class Imitation:
    """Trains a policy on demonstrations as `cold_start` says, each epoch in a fresh seeded order."""

    def __init__(
        self, policy: PackedModel, demos: Sequence[DemoRows], config: RunConfig, dump_folder: Path | None = None
    ) -> None:
        """The policy must already be on its device, or sharded; rows of a step that was not finite are written to
        `dump_folder`."""
        cold = config.cold_start
        settings = OptimizerSettings(
            lr=cold.lr, warmup_steps=cold.warmup_steps, total_steps=cold.steps, grad_clip=config.update.grad_clip
        )
        self.updater = Updater(
            policy,
            settings,
            token_budget=config.update.token_budget,
            head_chunk_bytes=config.update.head_chunk_bytes,
            dump_folder=dump_folder,
            reduce_gradients=config.parallel.reduce_gradients,
            share_prompts=config.update.share_prompts,
        )
        self.finished_steps = 0
        """Steps done, those included that were skipped because they were not finite."""
        self._demos = demos
        self._batches = _batches(len(demos), cold.batch_size, derive_seed(config.seed, "cold_start"))

    def step(self) -> dict[str, float]:
        """Take the next optimizer step.

        Returns:
            What `Updater.optimizer_step` does, `update/loss` being nats per action token, and `update/tokens`, those of
            the batch with its prompts and observations.
        """
        rows = [row for index in next(self._batches) for row in self._demos[index]]
        self.finished_steps += 1
        stats = self.updater.optimizer_step([LossGroup(rows, IMITATION)], seed=0)
        return stats | {"update/tokens": float(sum(len(row.tokens) for row in rows))}

    def skip(self, steps: int) -> None:
        """Go on behind this many steps, without taking them; weights and optimizer are the caller's to restore."""
        for _ in range(steps):
            next(self._batches)
        self.finished_steps += steps

    def loss(self, demos: Sequence[DemoRows]) -> float:
        """Return the negative log-likelihood of demonstrations under the present weights, nats per action token."""
        rows = [row for demo in demos for row in demo]
        total = sum(float(logp.sum(dtype=np.float64)) for logp in self.updater.score(rows))
        return -total / sum(int(row.action_mask.sum()) for row in rows)


def _batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of indices, each epoch in a fresh order; a rest smaller than a batch is carried over."""
    generator = np.random.default_rng(seed)
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, generator.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]
