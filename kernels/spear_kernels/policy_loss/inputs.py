"""The per-token arguments of a policy loss: as given, and cleaned with their aggregation weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from spear_kernels.checks import require_shape, to_device
from spear_kernels.cov_select import covariance, select_by_covariance
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.ratio import truncated_importance
from spear_kernels.segment_reduce import segment_index, segment_sum

Count = float | torch.Tensor


@dataclass(frozen=True)
class PolicyBatch:
    """The arguments as given, all [N] except the counts and the seed."""

    old_logp: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    seq_ids: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    num_tokens: Count | None = None
    num_seqs: Count | None = None
    seed: int = 0
    sampler_logp: torch.Tensor | None = None

    def check(
        self, num_rows: int, cfg: PolicyLossConfig, has_entropy: bool, device: torch.device | None = None
    ) -> PolicyBatch:
        """Return the batch detached, with a bool mask; raise ValueError for what does not fit `cfg` or [num_rows].

        With `device`, tensors that lie elsewhere, such as a plan made on the CPU, are copied there without waiting.
        """
        if cfg.per_sequence and self.seq_ids is None:
            raise ValueError(f"seq_ids is needed by kind={cfg.kind!r} with aggregation={cfg.aggregation!r}")
        if cfg.entropy_coef and not has_entropy:
            raise ValueError(f"entropy is needed by entropy_coef={cfg.entropy_coef}; pass entropy [N]")
        if cfg.kl_coef and self.ref_logp is None:
            raise ValueError(f"ref_logp is needed by kl_coef={cfg.kl_coef}; pass ref_logp [N]")
        if self.selected is not None and not cfg.uses_covariance:
            raise ValueError(f"selected has no meaning for kind={cfg.kind!r}; leave it None")
        if (cfg.tis_cap is None) != (self.sampler_logp is None):
            given = "None" if self.sampler_logp is None else "given"
            raise ValueError(f"tis_cap={cfg.tis_cap} but sampler_logp is {given}; set both or leave both None")
        for name in ("num_tokens", "num_seqs"):
            count = getattr(self, name)
            if isinstance(count, torch.Tensor) and count.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(count.shape)}, but is one number for the whole batch")
        changes = {"mask": self.mask.bool()}
        for name, tensor in {**self._rowwise(), "mask": changes["mask"]}.items():
            require_shape(name, tensor, (num_rows,))
            changes[name] = tensor.detach() if device is None else to_device(tensor.detach(), device)
        return replace(self, **changes)

    def with_selection(self, logp: torch.Tensor, cfg: PolicyLossConfig) -> tuple[PolicyBatch, torch.Tensor | None]:
        """Fill `selected` if the loss needs it; also the covariance float64 [N] when it had to be computed."""
        if not cfg.uses_covariance or self.selected is not None:
            return self, None
        cov = covariance(logp, self.advantages, self.mask)
        selected = select_by_covariance(
            cov,
            logp,
            self.old_logp,
            self.advantages,
            self.mask,
            cfg,
            self.seq_ids,
            self.seed,
            positions=self.positions,
            row_weight=self.row_weight,
        )
        return replace(self, selected=selected), cov

    def _rowwise(self) -> dict[str, torch.Tensor]:
        values = {name: getattr(self, name) for name in _ROWWISE}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


_ROWWISE = tuple(field.name for field in fields(PolicyBatch) if field.name not in ("num_tokens", "num_seqs", "seed"))


@dataclass(frozen=True)
class TokenInputs:
    """What the token-local formulas read, [N] each, in one float type; masked-out rows hold zeros."""

    old_logp: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor  # bool
    aggregation_weight: torch.Tensor
    """Factor of the token in the loss: 1/num_tokens, 1/num_seqs, ... and 0 where masked out."""
    row_weight: torch.Tensor | None = None
    """The given weight times the truncated importance weight."""
    ref_logp: torch.Tensor | None = None
    selected: torch.Tensor | None = None  # bool
    tis_weight: torch.Tensor | None = None
    tis_clipped: torch.Tensor | None = None  # bool

    @staticmethod
    def of(batch: PolicyBatch, cfg: PolicyLossConfig, dtype: torch.dtype) -> TokenInputs:
        """Clean a checked batch whose `selected` is filled."""
        mask = batch.mask

        def cleaned(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.where(mask, tensor.to(dtype), 0)

        old_logp = torch.where(mask, batch.old_logp.to(dtype), 0)
        row_weight, tis_weight, tis_clipped = cleaned(batch.row_weight), None, None
        if batch.sampler_logp is not None and cfg.tis_cap is not None:
            sampler_logp = torch.where(mask, batch.sampler_logp.to(dtype), 0)
            tis_weight, tis_clipped = truncated_importance(old_logp, sampler_logp, cfg.tis_cap)
            row_weight = tis_weight if row_weight is None else row_weight * tis_weight
        return TokenInputs(
            old_logp,
            torch.where(mask, batch.advantages.to(dtype), 0),
            mask,
            aggregation_weight(batch, cfg, dtype),
            row_weight,
            cleaned(batch.ref_logp),
            None if batch.selected is None else batch.selected.bool() & mask,
            tis_weight,
            tis_clipped,
        )

    def rows(self, rows: slice | torch.Tensor) -> TokenInputs:
        """The inputs of some rows."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor[rows] for name, tensor in parts.items() if tensor is not None})


def at_least_one(count: Count) -> Count:
    """`count`, or 1 if it is 0, so that an empty batch divides by 1."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def sequence_lengths(batch: PolicyBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels int64 [N] of the rows' sequences, and the number of action tokens by label, int64 [N]."""
    assert batch.seq_ids is not None
    index = segment_index(batch.seq_ids)
    return index, segment_sum(batch.mask.long(), index)


def aggregation_weight(batch: PolicyBatch, cfg: PolicyLossConfig, dtype: torch.dtype) -> torch.Tensor:
    """Weights [N]: the aggregated loss is their dot product with the token losses.

    Only sequences with an action token count as sequences.
    """
    weight = batch.mask.to(dtype)
    if cfg.aggregation == "token-mean":
        return weight / at_least_one(batch.mask.sum() if batch.num_tokens is None else batch.num_tokens)
    index, lengths = sequence_lengths(batch)
    weight = weight / at_least_one((lengths > 0).sum() if batch.num_seqs is None else batch.num_seqs)
    if cfg.aggregation == "seq-mean-token-mean":
        return weight / lengths[index].clamp(min=1)
    if cfg.aggregation == "seq-mean-token-sum-norm":
        assert cfg.norm_length is not None
        return weight / cfg.norm_length
    return weight
