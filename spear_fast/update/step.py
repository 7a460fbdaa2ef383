"""One optimizer step: the losses of one or several groups of rows, accumulated over packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spear_fast.batching import Counts, count
from spear_fast.types import MicroBatch, Row
from spear_kernels import PolicyLossConfig, covariance_metrics, covariance_select, linear_policy_loss
from spear_kernels.results import LinearPolicyLossResult

from .dump import dump_rows
from .metrics import join, read
from .optimizer import Optimizer, OptimizerSettings
from .scoring import PlannedBatch, Scorer, plan_batches

if TYPE_CHECKING:
    from .model import PackedModel


@dataclass(frozen=True)
class LossGroup:
    """Rows that share one loss, normalised by their own counts.

    Example: SPEAR's joint objective is `[LossGroup(fresh, cfg), LossGroup(replayed, sil_cfg, gamma, prefix="sil")]` in
    one step, and its separate step one group per step. Supervised learning is kind "reinforce" with advantages 1.
    """

    rows: Sequence[Row]
    cfg: PolicyLossConfig
    coef: float = 1.0
    """Weight of the group's loss in the step's loss; a group of weight 0 is left out."""
    stats: Literal["minibatch", "microbatch"] = "minibatch"
    """Where covariance statistics and draws are made; "microbatch" makes them depend on the packing."""
    prefix: str = "update"
    """First part of its metrics' names."""


class Updater:
    """Trains a policy: rows in, weights changed, metrics out. How rows are cut into micro-batches does not matter."""

    def __init__(
        self,
        policy: PackedModel,
        optimizer: OptimizerSettings,
        *,
        token_budget: int,
        temperature: float = 1.0,
        head_chunk_bytes: int | None = None,
        dump_folder: Path | None = None,
    ) -> None:
        """`token_budget` packed tokens per micro-batch; `temperature` of sampling; rows of a skipped step are written
        to `dump_folder`. The policy must already be on its device."""
        self.policy = policy
        self.optimizer = Optimizer(policy.model.parameters(), optimizer)
        self.scorer = Scorer(policy, token_budget, temperature, head_chunk_bytes)
        self.dump_folder = dump_folder

    def score(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probs of each row under the current weights, float32 [L], nats; 0 outside action tokens."""
        return self.scorer.score(rows)

    def optimizer_step(self, groups: Sequence[LossGroup], seed: int) -> dict[str, float]:
        """Take one step on sum over groups of coef * loss; return metrics `<prefix>/...` and `update/...`.

        `seed` keys the covariance draws. If a loss or the gradient norm is not finite, weights and optimizer stay as
        they are, `update/skipped_steps` is 1 and the rows are dumped. Without any row to learn from nothing happens
        and the result is empty.
        """
        groups = [group for group in groups if group.coef != 0 and count(group.rows).num_tokens]
        if not groups:
            return {}
        self.optimizer.zero_grad()
        metrics, trail = {}, []
        for group in groups:
            parts, covariance = self._backward(group, seed)
            metrics |= join([part_metrics for _, part_metrics in parts], group.prefix)
            metrics |= {f"{group.prefix}/{name}": value for name, value in covariance.items()}
            trail += [([group.rows[i] for i in planned.index], found["loss"]) for planned, found in parts]
        metrics["update/grad_norm"] = self.optimizer.clip_gradients()
        values = {**read(metrics), "update/lr": self.optimizer.lr, "update/micro_batches": float(len(trail))}
        losses_finite = all(math.isfinite(values[f"{group.prefix}/loss"]) for group in groups)
        skip = not (losses_finite and math.isfinite(values["update/grad_norm"]))
        if skip:
            self.optimizer.zero_grad()
            self._dump(trail)
        else:
            self.optimizer.step()
        return values | {"update/skipped_steps": float(skip)}

    def _backward(
        self, group: LossGroup, seed: int
    ) -> tuple[list[tuple[PlannedBatch, dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
        """Add the gradient; return the metrics of the micro-batches, and of the covariances if made over all."""
        planned = plan_batches(group.rows, self.scorer.token_budget, self.policy.device)
        counts = count(group.rows)
        selections, covariance = self._select(group, planned, seed)
        results = []
        for part, selected in zip(planned, selections, strict=True):
            result = self._loss(part, group.cfg, counts, selected, seed)
            (group.coef * result.loss).backward()
            # The rest of a result, log-probs and graph, would stay on the device until the step ends.
            results.append((part, result.metrics))
        return results, covariance

    def _loss(
        self, part: PlannedBatch, cfg: PolicyLossConfig, counts: Counts, selected: torch.Tensor | None, seed: int
    ) -> LinearPolicyLossResult:
        """The micro-batch's share of a loss with these denominators."""
        weight, bias = self.policy.head
        batch = part.batch
        return linear_policy_loss(
            self.scorer.action_hidden(part),
            weight,
            batch.targets,
            batch.old_logp,
            batch.advantages,
            None,
            cfg,
            batch.seq_ids,
            self.scorer.temperature,
            seed,
            bias=bias,
            ref_logp=batch.ref_logp,
            row_weight=batch.weight,
            positions=batch.positions,
            selected=selected,
            num_tokens=counts.num_tokens,
            num_seqs=counts.num_seqs,
            chunk_bytes=self.scorer.head_chunk_bytes,
        )

    def _select(
        self, group: LossGroup, planned: list[PlannedBatch], seed: int
    ) -> tuple[Sequence[torch.Tensor | None], dict[str, torch.Tensor]]:
        """The covariance choice of each micro-batch, made over the whole group; None where the loss makes its own.

        Costs one more forward pass over the group, so it is made only when there is a choice and several parts.
        """
        if not group.cfg.uses_covariance or group.stats == "microbatch" or len(planned) == 1:
            return [None] * len(planned), {}
        logp = torch.cat([self.scorer.batch_logp(part) for part in planned])

        def all_parts(name: str) -> torch.Tensor:
            return torch.cat([getattr(part.batch, name) for part in planned])

        advantages = all_parts("advantages").to(logp.device, non_blocking=True)
        selected = covariance_select(
            logp,
            all_parts("old_logp"),
            advantages,
            None,
            group.cfg,
            all_parts("seq_ids"),
            seed,
            positions=all_parts("positions"),
            row_weight=torch.cat([_weight(part.batch) for part in planned]),
        )
        parts = selected.split([len(part.batch.targets) for part in planned])
        return parts, covariance_metrics(logp, advantages, None)

    def _dump(self, trail: list[tuple[list[Row], torch.Tensor]]) -> None:
        """Write the rows whose loss was not finite; all of them if only the gradient was not."""
        if self.dump_folder is None:
            return
        offending = [row for rows, loss in trail if not loss.isfinite() for row in rows]
        rows = offending or [row for rows, _ in trail for row in rows]
        dump_rows(rows, self.dump_folder / f"skipped_after_step_{self.optimizer.num_steps:06d}.npz")


def _weight(batch: MicroBatch) -> torch.Tensor:
    """Importance weights [N] of a micro-batch, 1 where its rows have none."""
    return torch.ones_like(batch.old_logp) if batch.weight is None else batch.weight
