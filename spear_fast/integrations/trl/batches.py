"""Padded batches of sequences with what a policy loss reads of them: from TRL's inputs, and from replayed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from spear_fast.types import Row

from .logprob import IGNORED, loss_mask


@dataclass
class TokenBatch:
    """B sequences padded to L tokens on one device; per-token values mean something where `labels` is not -100."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], -100 where no action token
    advantages: torch.Tensor  # float32 [B]
    uid: torch.Tensor  # int64 [B]
    old_logp: torch.Tensor | None = None  # float32 [B, L]; None: the policy's own
    ref_logp: torch.Tensor | None = None  # float32 [B, L]
    row_weight: torch.Tensor | None = None  # float32 [B, L]

    @property
    def mask(self) -> torch.Tensor:
        """Action tokens, bool [B, L]."""
        return self.labels != IGNORED

    def counts(self) -> torch.Tensor:
        """Action tokens, and sequences with any, float64 [2]."""
        per_row = self.mask.sum(1)
        return torch.stack([per_row.sum(), (per_row > 0).sum()]).double()

    @cached_property
    def places(self) -> torch.Tensor:
        """Flat places of the action tokens in [B, L], int64 [n]; the first look waits for the device."""
        return self.mask.flatten().nonzero().squeeze(1)

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """The values [n] of the action tokens, from [B, L] or [B]."""
        return values.reshape(len(values), -1).expand_as(self.labels).flatten()[self.places]

    @property
    def positions(self) -> torch.Tensor:
        """Place of each action token among those of its row, int64 [B, L]: its name, whatever the padding."""
        return self.mask.long().cumsum(1) - 1

    @property
    def weights(self) -> torch.Tensor:
        """`row_weight`, 1 where there is none, float32 [B, L]."""
        return torch.ones_like(self.labels, dtype=torch.float32) if self.row_weight is None else self.row_weight


def joined_tokens(batches: Sequence[TokenBatch], values: Sequence[Any]) -> torch.Tensor:
    """The values [N] of the action tokens of all batches, from [B, L] or [B] for each."""
    return torch.cat([batch.tokens(value) for batch, value in zip(batches, values, strict=True)])


def from_inputs(inputs: dict[str, Any]) -> TokenBatch:
    """The batch of one entry of TRL's `_buffered_inputs`; the first token of a prompt is never scored."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    before = inputs["prompt_ids"].shape[1]

    def spread(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return pad(values.float().expand(-1, inputs["completion_ids"].shape[1]), (before, 0))

    mask = pad(loss_mask(inputs), (before, 0)).bool()
    return TokenBatch(
        ids,
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        ids.masked_fill(~mask, IGNORED),
        inputs["advantages"].float(),
        inputs["spear_uid"],
        spread(inputs.get("old_per_token_logps")),
        spread(inputs.get("ref_per_token_logps")),
        spread(inputs.get("importance_sampling_ratio")),
    )


def from_rows(rows: Sequence[Row], like: Row, num_rows: int, pad_id: int, device: torch.device) -> TokenBatch:
    """Rows padded on the right to one batch of `num_rows`; copies of `like` without action tokens fill it up."""
    filled = [*rows, *[like] * (num_rows - len(rows))]
    length = max(row.num_tokens for row in filled)

    def stacked(arrays: list[np.ndarray], filler: Any, dtype: torch.dtype) -> torch.Tensor:
        padded = [np.pad(array, (0, length - len(array)), constant_values=filler) for array in arrays]
        return torch.from_numpy(np.stack(padded)).to(device=device, dtype=dtype)

    labels = [np.where(row.action_mask, row.tokens, IGNORED) for row in rows]
    labels += [np.full(like.num_tokens, IGNORED, dtype=np.int32)] * (num_rows - len(rows))
    advantages = [row.advantages[row.action_mask].mean() for row in filled]
    weights = [np.ones(row.num_tokens, dtype=np.float32) if row.weight is None else row.weight for row in filled]
    weighted = any(row.weight is not None for row in filled)
    return TokenBatch(
        stacked([row.tokens for row in filled], pad_id, torch.int64),
        stacked([np.ones(row.num_tokens, dtype=np.int64) for row in filled], 0, torch.int64),
        stacked(labels, IGNORED, torch.int64),
        torch.tensor(np.array(advantages), dtype=torch.float32, device=device),
        torch.tensor([row.uid for row in filled], device=device),
        stacked([row.old_logp for row in filled], 0.0, torch.float32),
        row_weight=stacked(weights, 1.0, torch.float32) if weighted else None,
    )


def replay_batches(
    rows: Sequence[Row], batch_size: int, rank: int, num_ranks: int, pad_id: int, device: torch.device
) -> list[TokenBatch]:
    """This rank's batches of at most `batch_size` of `rows`, as many as every other rank's; rows may run out here."""
    wave = batch_size * num_ranks
    parts = [rows[start : start + wave] for start in range(0, len(rows), wave)]
    return [from_rows(part[rank::num_ranks], part[0], -(-len(part) // num_ranks), pad_id, device) for part in parts]


def to_rows(inputs: dict[str, Any], rewards: dict[int, float], version: int, group_size: int) -> list[Row]:
    """The rows with action tokens and A > 0 of one entry of TRL's `_buffered_inputs`, unpadded, on the host.

    `rewards` is the total reward by uid. Each row ends with its last action token and keeps TRL's importance weights;
    one whose weights are all 0, which has nothing to learn from, is left out.
    """
    host = {name: value.cpu().numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    mask = loss_mask(inputs).bool().cpu().numpy()
    ratio = host.get("importance_sampling_ratio")  # [B, C], or [B, 1] for whole sequences
    weights = None if ratio is None else np.where(mask, ratio, 1.0).astype(np.float32)
    made = []
    for index, uid in enumerate(host["spear_uid"].tolist()):
        counting = mask[index] if weights is None else mask[index] & (weights[index] != 0)
        if not (host["advantages"][index] > 0 and counting.any()):
            continue
        end = int(mask[index].nonzero()[0][-1]) + 1
        prompt = host["prompt_ids"][index][host["prompt_mask"][index].astype(bool)]
        before = np.zeros(len(prompt), dtype=np.float32)
        action = np.concatenate([before.astype(bool), mask[index, :end]])
        old_logp = np.concatenate([before, host["old_per_token_logps"][index, :end]]).astype(np.float32)
        made.append(
            Row(
                uid=uid,
                group_id=uid // group_size,
                version=version,
                tokens=np.concatenate([prompt, host["completion_ids"][index, :end]]).astype(np.int32),
                action_mask=action,
                old_logp=np.where(action, old_logp, 0.0).astype(np.float32),
                advantages=np.where(action, host["advantages"][index], 0.0).astype(np.float32),
                reward=rewards[uid],
                weight=None if weights is None else np.concatenate([np.ones_like(before), weights[index, :end]]),
            )
        )
    return made
