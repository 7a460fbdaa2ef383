"""One optimizer step: the losses of one or several groups of rows, accumulated over packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist

from spear_fast.batching import Counts, count
from spear_fast.types import Row
from spear_kernels import PolicyLossConfig, covariance_metrics, covariance_select, linear_policy_loss

from .dump import dump_rows
from .metrics import gather, join, read
from .optimizer import Optimizer, OptimizerSettings
from .scoring import PlannedBatch, Scorer, fresh_gap
from .sharding import set_reduction

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
    version: int | None = None
    """Where rows of several policy versions meet, the present one: the gap to the sampler, `logp_gap_nats`, is then
    that of rows sampled by it alone, and missing if there are none."""


@dataclass(frozen=True)
class _Plan:
    """A loss group cut into micro-batches."""

    group: LossGroup
    shares: list[list[list[int]]]
    """[rank][micro-batch] -> places in the group's rows."""
    own: list[PlannedBatch]
    """This rank's micro-batches; idle ones, with an empty `index`, keep step with the other ranks."""

    @property
    def indices(self) -> list[list[int]]:
        """Rows of the micro-batches of all ranks, rank by rank, idle ones left out."""
        return [index for share in self.shares for index in share if index]


class Updater:
    """Trains a policy: rows in, weights changed, metrics out. How rows are cut into micro-batches does not matter.

    Of a policy spread over ranks, all ranks make the same calls with the same rows, and get the same numbers.
    """

    def __init__(
        self,
        policy: PackedModel,
        optimizer: OptimizerSettings,
        *,
        token_budget: int,
        temperature: float = 1.0,
        head_chunk_bytes: int | None = None,
        dump_folder: Path | None = None,
        reduce_gradients: Literal["micro_batch", "step"] = "micro_batch",
        share_prompts: bool = False,
    ) -> None:
        """`token_budget` packed tokens per micro-batch, in which `share_prompts` computes a prompt once for all rows
        that begin with it; `temperature` of sampling; rows of a skipped step are written
        to `dump_folder`; `reduce_gradients` over ranks after each micro-batch, or once, from whole ones that each rank
        keeps. The policy must already be on its device, or sharded."""
        self.policy = policy
        self.optimizer = Optimizer(policy.model.parameters(), optimizer)
        self.scorer = Scorer(policy, token_budget, temperature, head_chunk_bytes, share_prompts)
        self.dump_folder = dump_folder
        self.reduce_gradients = reduce_gradients

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
        plans = [self._plan(group) for group in groups]
        metrics, trail, left = {}, [], sum(len(plan.own) for plan in plans)
        for plan in plans:
            own, covariance = self._backward(plan, seed, left)
            left -= len(plan.own)
            prefix, parts = plan.group.prefix, gather(own, self.policy.ranks)
            metrics |= join(parts, prefix) | {f"{prefix}/{name}": value for name, value in covariance.items()}
            for index, part in zip(plan.indices, parts, strict=True):
                trail.append(([plan.group.rows[i] for i in index], part["loss"]))
        metrics["update/grad_norm"] = self.optimizer.clip_gradients()
        values = {
            **_gap_of_fresh(read(metrics)),
            "update/lr": self.optimizer.lr,
            "update/micro_batches": float(len(trail)),
        }
        losses_finite = all(math.isfinite(values[f"{group.prefix}/loss"]) for group in groups)
        skip = not (losses_finite and math.isfinite(values["update/grad_norm"]))
        if skip:
            self.optimizer.zero_grad()
            self._dump(trail)
        else:
            self.optimizer.step()
        return values | {"update/skipped_steps": float(skip)}

    def _plan(self, group: LossGroup) -> _Plan:
        shares = self.scorer.share(group.rows)
        return _Plan(group, shares, self.scorer.plan(group.rows, shares))

    def _backward(
        self, plan: _Plan, seed: int, left: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Add the gradient of this rank's micro-batches; `left` are those of the whole step that are still to come.

        Returns the metrics of those with rows, and the covariances' if they were made over all.
        """
        group, counts = plan.group, count(plan.group.rows)
        selections, covariance = self._select(plan, seed)
        results = []
        for done, (part, selected) in enumerate(zip(plan.own, selections, strict=True)):
            set_reduction(self.policy, now=self.reduce_gradients == "micro_batch" or done + 1 == left)
            if not part.index:
                self.policy.run(part, _nothing).backward()
                continue
            loss, metrics = self._loss(part, group, counts, selected, seed)
            (group.coef * loss).backward()
            # The rest of a result, log-probs and graph, would stay on the device until the step ends.
            results.append(metrics)
        return results, covariance

    def _loss(
        self, part: PlannedBatch, group: LossGroup, counts: Counts, selected: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The micro-batch's share of the group's loss with these denominators, and its metrics."""
        batch = part.batch

        def loss(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            result = linear_policy_loss(
                hidden,
                weight,
                batch.targets,
                batch.old_logp,
                batch.advantages,
                None,
                group.cfg,
                batch.seq_ids,
                self.scorer.temperature,
                seed,
                bias=bias,
                vocab_size=self.policy.vocab_size,
                ref_logp=batch.ref_logp,
                row_weight=batch.weight,
                positions=batch.positions,
                selected=selected,
                num_tokens=counts.num_tokens,
                num_seqs=counts.num_seqs,
                chunk_bytes=self.scorer.head_chunk_bytes,
            )
            gap = {} if group.version is None else fresh_gap(result.logp, batch, group.version)
            return result.loss, result.metrics | gap

        return self.policy.run(part, loss)

    def _select(self, plan: _Plan, seed: int) -> tuple[Sequence[torch.Tensor | None], dict[str, torch.Tensor]]:
        """The covariance choice of each micro-batch, made over the whole group; None where the loss makes its own.

        Costs one more forward pass over the group, so it is made only when there is a choice and several parts.
        """
        group, planned = plan.group, plan.own
        if not group.cfg.uses_covariance or group.stats == "microbatch" or len(plan.indices) == 1:
            return [None] * len(planned), {}
        logp = torch.cat([self.scorer.batch_logp(part) for part in planned])

        def all_parts(name: str) -> torch.Tensor:
            return torch.cat([part.actions(name) for part in planned])

        ranks = None if self.policy.ranks is None else dist.group.WORLD
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
            row_weight=torch.cat([_weight(part) for part in planned]),
            group=ranks,
        )
        parts = selected.split([len(part.actions("targets")) for part in planned])
        return parts, covariance_metrics(logp, advantages, None, group=ranks)

    def _dump(self, trail: list[tuple[list[Row], torch.Tensor]]) -> None:
        """Write the rows whose loss was not finite; all of them if only the gradient was not. One rank writes."""
        if self.dump_folder is None or (self.policy.ranks is not None and not self.policy.ranks.is_main):
            return
        offending = [row for rows, loss in trail if not loss.isfinite() for row in rows]
        rows = offending or [row for rows, _ in trail for row in rows]
        dump_rows(rows, self.dump_folder / f"skipped_after_step_{self.optimizer.num_steps:06d}.npz")


def _gap_of_fresh(values: dict[str, float]) -> dict[str, float]:
    """Let `<prefix>/logp_gap_nats` be that of the rows sampled by the present weights, where it was asked for."""
    for name in [name for name in values if name.endswith("/fresh_fraction")]:
        prefix, share = name.removesuffix("fresh_fraction"), values.pop(name)
        gap = values.pop(f"{prefix}fresh_gap")
        values[f"{prefix}fresh_frac"] = share
        del values[f"{prefix}logp_gap_nats"]
        if share:
            values[f"{prefix}logp_gap_nats"] = gap / share
    return values


def _nothing(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """0 with a gradient of 0 in every parameter, since ranks reduce the gradients of the same ones."""
    touched = [hidden, weight[:1]] + ([] if bias is None else [bias[:1]])
    return sum((tensor.float().sum() * 0 for tensor in touched), hidden.new_zeros((), dtype=torch.float32))


def _weight(part: PlannedBatch) -> torch.Tensor:
    """Importance weights [N] of a micro-batch, 1 where its rows have none."""
    return torch.ones_like(part.actions("old_logp")) if part.batch.weight is None else part.actions("weight")
