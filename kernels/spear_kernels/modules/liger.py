"""`FusedLinearGRPOLoss`: the call of Liger's LigerFusedLinearGRPOLoss, computed by the operators of this library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spear_kernels.linear_logprob import linear_logprob
from spear_kernels.linear_policy_loss import linear_policy_loss
from spear_kernels.modules.grpo_terms import GRPOBatch, GRPOSettings, aggregated, reported, token_losses
from spear_kernels.policy_loss import PolicyLossConfig


@dataclass(frozen=True)
class _Head:
    """hidden [B * T, H], weight [V, H], bias [V], ids int64 [B * T], and how the head is applied."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    temperature: float
    chunk_bytes: int | None
    backend: str


class FusedLinearGRPOLoss(nn.Module):
    """GRPO and its relatives from hidden states: the arguments, values, gradients and metrics of Liger's class.

    Args:
        beta: Weight of the KL (k3) to the reference policy.
        compiled: Taken for compatibility, without effect: there is nothing to compile.
        use_ref_model: Whether a reference policy takes part.
        chunk_size: Taken for compatibility, without effect: `chunk_bytes` bounds the memory.
        epsilon_low: The ratio is clipped below at 1 - epsilon_low.
        epsilon_high: The ratio is clipped above at 1 + epsilon_high; for "cispo" at epsilon_high.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: In tokens, for "dr_grpo".
        importance_sampling_level: "token", or "sequence" (GSPO).
        sapo_temperature_pos: Of SAPO's gate for positive advantages; sapo_temperature_neg for the others.
        temperature: Divides the logits.
        delta: Upper bound of the unclipped ratio (INTELLECT-2); None switches it off.
        use_bias_correction_kl: Multiply the KL by the ratio (DeepSeek-V3.2).
        vespo_k_pos: Shape of VESPO's weight for advantages >= 0, with vespo_lambda_pos; the two with _neg for others.
        chunk_bytes: As in `linear_logprob`.
        backend: As in `linear_logprob`.

    What differs from Liger: products of half-precision inputs are kept in float32, and log-ratios beyond 20 nats are
    clamped in the gradient (`policy_loss`). "luspo" counts what stands at padded places, as Liger does.

    FLOPs with N tokens of which a share g has a gradient: (2 + 4 g) NVH for token-level ratios of "grpo", "bnpo",
    "dr_grpo", "dapo" and "cispo", unless delta < 1 + epsilon_high, use_bias_correction_kl, or epsilon_high < 1 for
    "cispo"; the costs of `linear_logprob` otherwise.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.settings = GRPOSettings(
            beta,
            epsilon_low,
            epsilon_high,
            loss_type,
            max_completion_length,
            importance_sampling_level,
            (sapo_temperature_pos, sapo_temperature_neg),
            delta,
            use_bias_correction_kl,
            (vespo_k_pos, vespo_lambda_pos),
            (vespo_k_neg, vespo_lambda_neg),
        )
        self.use_ref_model = use_ref_model
        self.temperature, self.chunk_bytes, self.backend = temperature, chunk_bytes, backend

    def forward(
        self,
        _input: torch.Tensor,
        lin_weight: torch.Tensor,
        selected_token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        advantages: torch.Tensor,
        bias: torch.Tensor | None = None,
        ref_per_token_logps: torch.Tensor | None = None,
        old_per_token_logps: torch.Tensor | None = None,
        ref_input: torch.Tensor | None = None,
        ref_weight: torch.Tensor | None = None,
        ref_bias: torch.Tensor | None = None,
        vllm_is_ratio: torch.Tensor | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss, 0-d, and detached metrics: the mean KL where beta is not 0, then the share of clipped tokens.

        Args:
            _input: [B, T, H], hidden states that predict the completion's tokens.
            lin_weight: [V, H].
            selected_token_ids: int64 [B, T].
            attention_mask: [B, T], not 0 at the completion's tokens.
            advantages: [B].
            bias: [V].
            ref_per_token_logps: [B, T].
            old_per_token_logps: [B, T]; None: the present log-probs, a ratio of 1.
            ref_input: [B, T, H] with ref_weight [V, H] and ref_bias [V], in place of ref_per_token_logps.
            vllm_is_ratio: [B, T] or [B, 1], weight of each token's policy term.
            num_items_in_batch: Completion tokens of the optimizer step on all ranks, for "dapo", "cispo" and "vespo";
                None: of this call on all ranks, which takes an all-reduce.

        Raises:
            ValueError: a shape does not fit, or the reference policy is missing.
        """
        shape = _shape(_input, selected_token_ids, attention_mask, advantages, vllm_is_ratio)
        ids = selected_token_ids.reshape(-1)
        how = self.temperature, self.chunk_bytes, self.backend
        head = _Head(_input.reshape(-1, _input.shape[2]), lin_weight, bias, ids, *how)
        ref_logp = None
        if self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "use_ref_model is set, but there are neither ref_per_token_logps nor ref_input and ref_weight"
                )
            if self.settings.beta:
                reference = _Head(ref_input.reshape(-1, ref_input.shape[-1]), ref_weight, ref_bias, ids, *how)
                with torch.no_grad():
                    ref_logp = _logp(reference, None).view(shape)
        elif self.use_ref_model:
            ref_logp = ref_per_token_logps
        batch = GRPOBatch.of(
            attention_mask, advantages, old_per_token_logps, ref_logp, vllm_is_ratio, num_items_in_batch, self.settings
        )
        cfg = self.settings.one_shot(has_old=old_per_token_logps is not None, has_ref=ref_logp is not None)
        if cfg is None:
            logp = _logp(head, None if self.settings.counts_padding else batch.mask.reshape(-1)).view(shape)
            loss = aggregated(token_losses(logp, batch, self.settings), batch, self.settings)
            return loss, reported(logp.detach(), batch, self.settings)
        swept, logp = _swept(head, batch, cfg)
        # The sweep gives the gradient; with a ratio of 1 by definition its value is another one.
        value = aggregated(token_losses(logp, batch, self.settings), batch, self.settings)
        return value + (swept - swept.detach()), reported(logp, batch, self.settings)


def _shape(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    is_ratio: torch.Tensor | None,
) -> tuple[int, int]:
    """B, T. Raises ValueError if the arguments disagree on them."""
    if hidden.dim() != 3:
        raise ValueError(f"_input has shape {tuple(hidden.shape)}, expected [B, T, H]")
    shape = (hidden.shape[0], hidden.shape[1])
    for name, tensor in (("selected_token_ids", ids), ("attention_mask", mask)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tuple(advantages.shape) != shape[:1]:
        raise ValueError(f"advantages has shape {tuple(advantages.shape)}, expected {shape[:1]}")
    if is_ratio is not None and tuple(is_ratio.shape) not in (shape, (shape[0], 1)):
        raise ValueError(f"vllm_is_ratio has shape {tuple(is_ratio.shape)}, expected {shape} or {(shape[0], 1)}")
    return shape


def _logp(head: _Head, mask: torch.Tensor | None) -> torch.Tensor:
    """Differentiable log-probs [B * T], 0 where mask is False."""
    settings = {"chunk_bytes": head.chunk_bytes, "backend": head.backend}
    args = head.hidden, head.weight, head.ids, head.temperature
    return linear_logprob(*args, bias=head.bias, mask=mask, **settings).logp


def _swept(head: _Head, batch: GRPOBatch, cfg: PolicyLossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, whose gradient counts, and detached log-probs [B, T]."""
    shape = batch.mask.shape
    device = batch.mask.device

    def flat(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.expand(shape).reshape(-1)

    sequences = torch.arange(shape[0], device=device)[:, None]
    old_logp = torch.zeros(shape, device=device) if batch.old_logp is None else batch.old_logp
    result = linear_policy_loss(
        head.hidden,
        head.weight,
        head.ids,
        old_logp.reshape(-1),
        batch.advantages.expand(shape).reshape(-1),
        batch.mask.reshape(-1),
        cfg,
        flat(sequences),
        head.temperature,
        bias=head.bias,
        ref_logp=flat(batch.ref_logp),
        row_weight=flat(batch.is_ratio),
        num_tokens=batch.normalizer,
        num_seqs=shape[0],
        chunk_bytes=head.chunk_bytes,
        backend=head.backend,
    )
    return result.loss, result.logp.view(shape)
