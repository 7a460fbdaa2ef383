"""What a model with a `PolicyHead` is given and returns: batched [B, L] inputs, the rows they label, the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spear_kernels.checks import host_may_wait, require_shape, to_device
from spear_kernels.policy_loss import PolicyLossConfig
from spear_kernels.policy_loss.inputs import Count

IGNORED = -100
"""Label of a token that is not scored, as in torch's cross-entropy."""

TOKEN_FIELDS = ("old_logp", "advantages", "seq_ids", "positions", "ref_logp", "row_weight", "selected", "sampler_logp")
"""Fields of `PolicyInputs` with a value for each token, [B, L], or for each sequence, [B]."""


class PolicyInputs:
    """Labels of a batch and, with `cfg`, what its policy loss needs; `linear_policy_loss` explains the fields.

    Per-token tensors are [B, L], aligned with `labels` (the value at t belongs to the token at t); one value for each
    row of the batch may be given as [B]. What stands at unlabelled places is never read. Without `cfg` only
    `temperature` may be given, and the model returns differentiable log-probs and entropies.

    This is no dataclass on purpose: FSDP2 rounds the tensors of dataclasses to the type of the forward pass, and DDP
    moves those of tuples to the device. Here they keep their types, and those that lie on the CPU stay there, where
    they are planned by without waiting for the device.

    Args:
        labels: int64 [B, L]: ids of tokens to score, -100 elsewhere. The label at t is scored by the hidden state at
            t - 1, so the labels of the first column are never scored. In packed sequences set it to -100 at the first
            token of each.
        old_logp: [B, L], log-probs at sampling time.
        advantages: [B, L] or [B].
        cfg: The loss.
        temperature: A number, [B, L] or [B]; None takes that of `replace_lm_head`.
        seq_ids: int64 [B, L]; None: each row of the batch is a sequence.
        positions: int64 [B, L], distinct within a sequence; None: the column. The draw of Clip-Cov depends on them.
        ref_logp: [B, L], under the reference policy, for `cfg.kl_coef`.
        row_weight: [B, L] or [B], weight of replayed tokens.
        selected: bool [B, L], from `covariance_select`.
        sampler_logp: [B, L], for `cfg.tis_cap`.
        num_tokens: Labelled tokens of the mini-batch, all micro-batches and ranks; None: of this call.
        num_seqs: Its sequences, likewise.
        seed: Of the draw of Clip-Cov.

    Raises:
        ValueError: an argument that `cfg` needs is missing, one is given that means nothing without it, or a shape.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        old_logp: torch.Tensor | None = None,
        advantages: torch.Tensor | None = None,
        cfg: PolicyLossConfig | None = None,
        *,
        temperature: float | torch.Tensor | None = None,
        seq_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        ref_logp: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
        selected: torch.Tensor | None = None,
        sampler_logp: torch.Tensor | None = None,
        num_tokens: Count | None = None,
        num_seqs: Count | None = None,
        seed: int = 0,
    ) -> None:
        if labels.dim() != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; pass int64 [B, L]")
        self.labels, self.cfg, self.temperature = labels, cfg, temperature
        self.old_logp, self.advantages = old_logp, advantages
        self.seq_ids, self.positions, self.ref_logp, self.row_weight = seq_ids, positions, ref_logp, row_weight
        self.selected, self.sampler_logp = selected, sampler_logp
        self.num_tokens, self.num_seqs, self.seed = num_tokens, num_seqs, seed
        self._check()

    def _check(self) -> None:
        given = [name for name in (*TOKEN_FIELDS, "num_tokens", "num_seqs") if getattr(self, name) is not None]
        if self.cfg is None and given:
            raise ValueError(f"{', '.join(given)} given without cfg; pass a PolicyLossConfig, or labels alone")
        if self.cfg is not None and (self.old_logp is None or self.advantages is None):
            missing = "old_logp" if self.old_logp is None else "advantages"
            raise ValueError(f"{missing} is needed by cfg; pass it, or leave cfg None to get log-probs alone")
        shape = tuple(self.labels.shape)
        for name in (*TOKEN_FIELDS, "temperature"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and tuple(value.shape) not in ((), shape[:1]):
                require_shape(name, value, shape)
            elif isinstance(value, torch.Tensor) and value.dim() == 0 and name != "temperature":
                raise ValueError(f"{name} is a single number; pass [B, L] or [B]")


@dataclass(frozen=True)
class LabelledRows:
    """Places of the labels to score, in the order of the batch, on the device where the labels lie."""

    row: torch.Tensor  # int64 [n], below B
    column: torch.Tensor  # int64 [n], 1..L-1
    ids: torch.Tensor  # int64 [n]
    shape: tuple[int, int]  # B, L

    @staticmethod
    def of(labels: torch.Tensor) -> LabelledRows:
        """Look for labels other than -100 behind the first column; waits for the device where they lie on one."""
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        column = column + 1
        num_rows, length = labels.shape
        return LabelledRows(row, column, labels[row, column].long(), (num_rows, length))

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The values [n] of [B, L] or [B] at the labels; on the CPU where both lie there."""
        if not host_may_wait(self.row):
            values = to_device(values, self.row.device)
        index = (self.row, self.column)[: values.dim()]
        return values[tuple(to_device(part, values.device) for part in index)]

    def hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states [n, H] that predict the labels, from [B, L, H]."""
        index = to_device(self.row * self.shape[1] + self.column - 1, hidden.device)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L] with values [n] at the labels and 0 elsewhere, differentiable."""
        index = to_device(self.row, values.device), to_device(self.column, values.device)
        return values.new_zeros(self.shape).index_put(index, values)


class PolicyOutput(NamedTuple):
    """What a model with a `PolicyHead` returns when it is given labels; 0 at places that are not scored.

    A tuple, so that FSDP2, DDP and accelerate find the tensors in it.
    """

    loss: torch.Tensor | None  # 0-d, of `linear_policy_loss`; None without a `cfg`
    logp: torch.Tensor  # [B, L] float32 or float64, in nats; differentiable without a `cfg`
    entropy: torch.Tensor  # [B, L], likewise
    metrics: dict[str, torch.Tensor] | None
    aux_loss: Any = None
    """The model's own load-balancing loss, 0-d, where it returns one; `loss` does not contain it."""
