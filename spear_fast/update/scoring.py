"""Forward passes over rows: packed micro-batches, and log-probs under the current weights without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spear_fast.batching import collate
from spear_fast.batching.balance import distribute
from spear_fast.types import MicroBatch, Row
from spear_kernels import linear_logprob

from .attention_plan import AttentionPlan, Backend, plan_attention

if TYPE_CHECKING:
    from .model import PackedModel

IDLE = Row(
    uid=0,
    group_id=0,
    version=0,
    tokens=np.zeros(2, dtype=np.int32),
    action_mask=np.array([False, True]),
    old_logp=np.zeros(2, dtype=np.float32),
    advantages=np.zeros(2, dtype=np.float32),
)
"""A row for forward and backward passes that count for nothing: ranks gather weights together or not at all."""


@dataclass(frozen=True)
class PlannedBatch:
    """A micro-batch on the device with what the host knows about it."""

    index: list[int]
    """Places of its rows in the list that was packed; empty for one that only keeps step with other ranks."""
    batch: MicroBatch
    plan: AttentionPlan

    def actions(self, name: str) -> torch.Tensor:
        """A field [N] of the batch, without what an idle one holds."""
        values = getattr(self.batch, name)
        return values if self.index else values[:0]


def plan_batches(
    rows: Sequence[Row],
    parts: Sequence[list[int]],
    device: torch.device | str,
    *,
    share_prompts: bool = False,
    backend: Backend = "sdpa",
) -> list[PlannedBatch]:
    """Micro-batches of the rows with these places; without any, of a row that stands for none.

    With `share_prompts` each computes a prompt once for all its rows that begin with it.
    """
    planned = []
    for index in parts:
        batch = collate(rows, index, device, share_prompts=share_prompts) if index else collate([IDLE], [0], device)
        planned.append(PlannedBatch(index, batch, plan_attention(batch.segments, device, backend)))
    return planned


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
    share_prompts: bool = False
    """Compute a prompt once per micro-batch for all rows that begin with it."""

    def share(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """Micro-batches of each rank: [rank][micro-batch] -> places in `rows`, the same on all ranks."""
        width = self.policy.model.config.get_text_config().hidden_size
        return distribute(rows, self.token_budget, self.policy.num_ranks, share_prompts=self.share_prompts, width=width)

    def plan(self, rows: Sequence[Row], shares: list[list[list[int]]]) -> list[PlannedBatch]:
        """This rank's micro-batches among `share(rows)`."""
        rank = 0 if self.policy.ranks is None else self.policy.ranks.rank
        return plan_batches(
            rows, shares[rank], self.policy.device, share_prompts=self.share_prompts, backend=self.policy.attention
        )

    @torch.no_grad()
    def batch_logp(self, planned: PlannedBatch) -> torch.Tensor:
        """Log-probs [N] of the action tokens of one micro-batch, float32, nats, without gradients."""

        def logp(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return linear_logprob(
                hidden,
                weight,
                planned.batch.targets,
                self.temperature,
                bias=bias,
                vocab_size=self.policy.vocab_size,
                chunk_bytes=self.head_chunk_bytes,
            ).logp

        found = self.policy.run(planned, logp)
        return found if planned.index else found[:0]

    def score(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probs of each row, float32 [L], nats at the sampling temperature; 0 outside action tokens.

        All ranks call it with the same rows and get the same answer; each computes a share.
        """
        if not rows:
            return []
        planned = self.plan(rows, self.share(rows))
        logp = torch.cat([self.batch_logp(part) for part in planned]).float().cpu().numpy()
        scored: dict[int, np.ndarray] = {}
        first = 0
        for index in (index for part in planned for index in part.index):
            mask = rows[index].action_mask
            scored[index] = np.zeros(len(mask), dtype=np.float32)
            scored[index][mask] = logp[first : first + mask.sum()]
            first += mask.sum()
        for others in [] if self.policy.ranks is None else self.policy.ranks.gather(scored):
            scored |= others
        return [scored[index] for index in range(len(rows))]


def fresh_gap(logp: torch.Tensor, batch: MicroBatch, version: int) -> dict[str, torch.Tensor]:
    """How far log-probs [N] of a micro-batch are from the sampler's, over rows that policy `version` sampled whole.

    Returns, 0-d and without gradients, `fresh_gap` (sum of |logp - old_logp| over their tokens, nats) and
    `fresh_fraction` (number of their tokens), both divided by all tokens of the batch: so both may be averaged over
    micro-batches by their tokens, and the mean gap of fresh tokens is the quotient of the two averages.
    """
    fresh = batch.versions >= version
    gap = torch.where(fresh, (logp.detach().float() - batch.old_logp).abs(), 0.0)
    return {"fresh_gap": gap.mean(), "fresh_fraction": fresh.float().mean()}


def fill_ref_logp(rows: Sequence[Row], reference: Scorer) -> None:
    """Set `ref_logp` of every row to the log-probs under the reference policy."""
    for row, logp in zip(rows, reference.score(rows), strict=True):
        row.ref_logp = logp
