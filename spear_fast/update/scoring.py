"""Forward passes over rows: packed micro-batches, and log-probs under the current weights without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spear_fast.batching import collate, pack
from spear_fast.types import MicroBatch, Row
from spear_kernels import linear_logprob

from .attention import AttentionPlan, plan_attention, select_rows

if TYPE_CHECKING:
    from .model import PackedModel


@dataclass(frozen=True)
class PlannedBatch:
    """A micro-batch on the device with what the host knows about it."""

    index: list[int]
    """Places of its rows in the list that was packed."""
    batch: MicroBatch
    plan: AttentionPlan


def plan_batches(rows: Sequence[Row], token_budget: int, device: torch.device | str) -> list[PlannedBatch]:
    """Pack rows into micro-batches of at most `token_budget` tokens (a longer row sits alone)."""
    return [
        PlannedBatch(index, collate(rows, index, device), plan_attention([rows[i].num_tokens for i in index], device))
        for index in pack(rows, token_budget)
    ]


@dataclass(frozen=True)
class Scorer:
    """Log-probs of rows under a policy: for old log-probs, the gap to the sampler, and a reference policy."""

    policy: PackedModel
    token_budget: int
    """Packed tokens per forward pass."""
    temperature: float = 1.0
    """The sampling temperature."""
    head_chunk_bytes: int | None = None
    """Memory for the logits that exist at once; None takes the operators' default."""

    def action_hidden(self, planned: PlannedBatch) -> torch.Tensor:
        """Hidden states [N, H] that predict the action tokens of a micro-batch."""
        return select_rows(self.policy.hidden_states(planned.batch, planned.plan), planned.batch.predictors)

    @torch.no_grad()
    def batch_logp(self, planned: PlannedBatch) -> torch.Tensor:
        """Log-probs [N] of the action tokens of one micro-batch, float32, nats, without gradients."""
        weight, bias = self.policy.head
        return linear_logprob(
            self.action_hidden(planned),
            weight,
            planned.batch.targets,
            self.temperature,
            bias=bias,
            chunk_bytes=self.head_chunk_bytes,
        ).logp

    def score(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probs of each row, float32 [L], nats at the sampling temperature; 0 outside action tokens."""
        planned = plan_batches(rows, self.token_budget, self.policy.device)
        if not planned:
            return []
        logp = torch.cat([self.batch_logp(part) for part in planned]).float().cpu().numpy()
        order = [index for part in planned for index in part.index]
        flat = np.zeros(sum(rows[index].num_tokens for index in order), dtype=np.float32)
        flat[np.concatenate([rows[index].action_mask for index in order])] = logp
        ends = np.cumsum([rows[index].num_tokens for index in order])
        scored = dict(zip(order, np.split(flat, ends[:-1]), strict=True))
        return [scored[index] for index in range(len(rows))]


def fill_ref_logp(rows: Sequence[Row], reference: Scorer) -> None:
    """Set `ref_logp` of every row to the log-probs under the reference policy."""
    for row, logp in zip(rows, reference.score(rows), strict=True):
        row.ref_logp = logp
