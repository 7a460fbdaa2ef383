"""The losses of Liger's and TRL's GRPO as formulas on log-probs [B, T]: per-token values, their sums, the metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from spear_kernels.policy_loss import PolicyLossConfig

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
MAX_LOG_WEIGHT = 20.0
MIN_LOG_WEIGHT = math.log(1e-8)
"""VESPO: bounds of the log of a sequence's weight, in nats."""


@dataclass(frozen=True)
class GRPOSettings:
    """The settings of `FusedLinearGRPOLoss` that decide about values."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperatures: tuple[float, float]  # for A > 0, for A <= 0
    delta: float | None
    use_bias_correction_kl: bool
    vespo_pos: tuple[float, float]  # k, lambda for A >= 0
    vespo_neg: tuple[float, float]

    def __post_init__(self) -> None:
        level = self.importance_sampling_level
        for name, allowed in (("loss_type", LOSS_TYPES), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if level == "sequence" and self.loss_type in TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"importance_sampling_level='sequence' has no meaning for loss_type={self.loss_type!r}; choose 'token'"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length, in tokens")
        for name in ("epsilon_low", "epsilon_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        for name, value in zip(("sapo_temperature_pos", "sapo_temperature_neg"), self.sapo_temperatures, strict=True):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta={self.delta} must be positive, or None to switch it off")

    @property
    def clips(self) -> bool:
        """Whether the ratio is clipped, as in PPO."""
        return self.loss_type not in TOKEN_LEVEL_ONLY

    @property
    def counts_padding(self) -> bool:
        """Whether padded tokens enter the loss: LUSPO sums over all of a row, as Liger and TRL do."""
        return self.loss_type == "luspo"

    def one_shot(self, *, has_old: bool, has_ref: bool) -> PolicyLossConfig | None:
        """What `linear_policy_loss` can do the same by, up to the value without `has_old`; None if it cannot."""
        sequence_level = self.importance_sampling_level == "sequence"
        corrected = self.use_bias_correction_kl and self.beta != 0
        if sequence_level or self.loss_type in ("sapo", "vespo", "luspo") or corrected or self.beta < 0:
            return None
        aggregation = "seq-mean-token-mean" if self.loss_type == "grpo" else "token-mean"
        if self.loss_type == "cispo":
            if self.epsilon_high < 1:
                return None
            bounds: dict[str, Any] = {"kind": "cispo", "clip_low": 1.0, "clip_high": self.epsilon_high - 1}
        else:
            if self.delta is not None and not self.delta > 1 + self.epsilon_high:
                return None
            bounds = {"kind": "ppo", "clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
            # For A > 0 the clip binds before; for A < 0 the bound is that of the dual clip.
            bounds["dual_clip"] = self.delta
        if not has_old:
            bounds = {"kind": "reinforce"}
        # The KL of a policy to itself has no gradient.
        return PolicyLossConfig(aggregation=aggregation, kl_coef=self.beta if has_ref else 0.0, **bounds)


@dataclass(frozen=True)
class GRPOBatch:
    """Completions: all [B, T] but `advantages` [B, 1]."""

    mask: torch.Tensor  # bool
    advantages: torch.Tensor  # [B, 1]
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    is_ratio: torch.Tensor | None  # [B, T] or [B, 1]
    normalizer: torch.Tensor  # 0-d, what sums over tokens are divided by, unless sequences are averaged first

    @staticmethod
    def of(
        mask: torch.Tensor,
        advantages: torch.Tensor,
        old_logp: torch.Tensor | None,
        ref_logp: torch.Tensor | None,
        is_ratio: torch.Tensor | None,
        num_items: float | torch.Tensor | None,
        settings: GRPOSettings,
    ) -> GRPOBatch:
        """The batch detached, with what the loss is divided by."""
        mask = mask.bool()
        if settings.loss_type in ("dapo", "cispo", "vespo"):
            normalizer = tokens_per_rank(mask, num_items)
        elif settings.loss_type == "dr_grpo":
            assert settings.max_completion_length is not None
            normalizer = torch.full((), float(len(mask) * settings.max_completion_length), device=mask.device)
        else:
            normalizer = mask.sum().clamp(min=1).float()
        old_logp = None if old_logp is None else old_logp.detach()
        return GRPOBatch(mask, advantages.detach()[:, None], old_logp, ref_logp, is_ratio, normalizer)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each completion, at least 1, [B, 1]."""
        return self.mask.sum(1, keepdim=True).clamp(min=1)


def tokens_per_rank(mask: torch.Tensor, num_items: float | torch.Tensor | None) -> torch.Tensor:
    """Mean over ranks of the number of tokens, 0-d float32: given as a total, or counted by an all-reduce."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(num_items, torch.Tensor):
        total = num_items.to(mask.device).float()
    else:
        total = mask.sum().float() if num_items is None else torch.full((), float(num_items), device=mask.device)
    if not parallel:
        return total.clamp(min=1)
    if num_items is None:
        torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).clamp(min=1)


def _log_ratio(logp: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> torch.Tensor:
    """Log of the ratio, [B, T], or [B, 1] at sequence level: the mean over the sequence."""
    log_ratio = logp - (logp.detach() if batch.old_logp is None else batch.old_logp)
    if settings.importance_sampling_level == "token":
        return log_ratio
    return torch.where(batch.mask, log_ratio, 0).sum(1, keepdim=True) / batch.lengths


def _surrogate(logp: torch.Tensor, log_ratio: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> torch.Tensor:
    """The policy term of each token, [B, T] or [B, 1]."""
    advantages, ratio = batch.advantages, log_ratio.exp()
    if settings.loss_type == "cispo":
        return -ratio.detach().clamp(max=settings.epsilon_high) * advantages * logp
    if settings.loss_type == "sapo":
        positive, negative = settings.sapo_temperatures
        sharpness = torch.where(advantages > 0, positive, negative)
        return -advantages * torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness
    if settings.loss_type == "vespo":
        return -_vespo_weight(log_ratio.detach(), batch, settings) * advantages * logp
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def _vespo_weight(log_ratio: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> torch.Tensor:
    """w^k exp(lambda (1 - w)) [B, 1], w the weight of the whole sequence within its bounds."""
    total = torch.where(batch.mask, log_ratio.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT), 0).sum(1, keepdim=True)
    if batch.is_ratio is not None:
        # Padded places count, as they do in Liger.
        total = total + batch.is_ratio.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_WEIGHT).sum(1, keepdim=True)
    total = total.clamp(MIN_LOG_WEIGHT, MAX_LOG_WEIGHT)
    (k_pos, lambda_pos), (k_neg, lambda_neg) = settings.vespo_pos, settings.vespo_neg
    k = torch.where(batch.advantages >= 0, k_pos, k_neg)
    rate = torch.where(batch.advantages >= 0, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (rate + k * total - rate * total.exp()).exp().nan_to_num(0.0, 0.0, 0.0)


def _reference_kl(
    logp: torch.Tensor, log_ratio: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings
) -> torch.Tensor:
    """k3 of each token [B, T]; without a reference policy 0, that of the policy to itself."""
    d = logp - (logp.detach() if batch.ref_logp is None else batch.ref_logp.detach())
    kl = torch.expm1(-d) + d
    return kl * log_ratio.exp() if settings.use_bias_correction_kl else kl


def token_losses(logp: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> torch.Tensor:
    """The loss of each token [B, T], or of each sequence [B, 1], differentiable in logp [B, T]."""
    log_ratio = _log_ratio(logp, batch, settings)
    losses = _surrogate(logp, log_ratio, batch, settings)
    if batch.is_ratio is not None and settings.loss_type != "vespo":
        losses = losses * batch.is_ratio
    if settings.beta:
        losses = losses + settings.beta * _reference_kl(logp, log_ratio, batch, settings)
    return losses


def aggregated(losses: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> torch.Tensor:
    """The loss, 0-d, from `token_losses`."""
    if settings.loss_type == "luspo":
        return (losses * batch.mask.sum(1, keepdim=True)).mean()
    masked = torch.where(batch.mask, losses, 0)
    if settings.loss_type in ("grpo", "sapo"):
        return (masked.sum(1, keepdim=True) / batch.lengths).mean()
    return masked.sum() / batch.normalizer


def reported(logp: torch.Tensor, batch: GRPOBatch, settings: GRPOSettings) -> tuple[torch.Tensor, ...]:
    """Means over all tokens, 0-d: of the KL where beta is not 0, and of whether a token is clipped."""
    log_ratio, advantages = _log_ratio(logp, batch, settings), batch.advantages
    num_tokens = batch.mask.sum().clamp(min=1)
    ratio = log_ratio.exp()
    clipped = torch.zeros_like(batch.mask)
    if settings.clips:
        below, above = ratio < 1 - settings.epsilon_low, ratio > 1 + settings.epsilon_high
        clipped = (below & (advantages < 0)) | (above & (advantages > 0))
    elif settings.loss_type == "cispo":
        clipped = (ratio > settings.epsilon_high) & (advantages > 0)
    share = (clipped & batch.mask).sum() / num_tokens
    if not settings.beta:
        return (share,)
    kl = _reference_kl(logp, log_ratio, batch, settings)
    return torch.where(batch.mask, kl, 0).sum() / num_tokens, share
