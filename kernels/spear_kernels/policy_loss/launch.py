"""Host part of the Triton policy loss: what depends on whole sequences, buffers, and the launch."""

from __future__ import annotations

from typing import Any

import torch

from spear_kernels.policy_loss.config import KINDS, KL_KINDS, PolicyLossConfig
from spear_kernels.policy_loss.evaluate import Evaluation, gspo_ratio
from spear_kernels.policy_loss.inputs import PolicyBatch, sequence_lengths
from spear_kernels.policy_loss.kernel import BLOCK, CHUNK, NUM_WARPS, SLOTS, policy_loss_kernel
from spear_kernels.policy_loss.metrics import METRICS, QUANTILES, covariance_quantiles

_kernel: Any = policy_loss_kernel


def _sequence_level(
    logp: torch.Tensor, batch: PolicyBatch, cfg: PolicyLossConfig
) -> tuple[torch.Tensor | None, torch.Tensor | None, float | torch.Tensor | None]:
    """GSPO's ratio [N], lengths [N] of the rows' sequences, and the loss's denominator (None: the kernel counts)."""
    ratio = gspo_ratio(logp.float(), batch) if cfg.kind == "gspo" else None
    if cfg.aggregation == "token-mean":
        return ratio, None, batch.num_tokens
    token_means = cfg.aggregation == "seq-mean-token-mean"
    if batch.num_seqs is not None and not token_means:
        return ratio, None, batch.num_seqs
    index, lengths = sequence_lengths(batch)
    num_seqs = (lengths > 0).sum() if batch.num_seqs is None else batch.num_seqs
    return ratio, lengths[index] if token_means else None, num_seqs


def triton_evaluation(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    batch: PolicyBatch,
    cfg: PolicyLossConfig,
    cov: torch.Tensor | None,
) -> Evaluation:
    """`torch_evaluation` in one launch; `batch` and `cov` come from `PolicyBatch.with_selection`, all on one device."""
    num_rows = len(logp)
    ratio, lengths, count = _sequence_level(logp, batch, cfg)
    vectors = (
        logp,
        batch.old_logp,
        batch.advantages,
        batch.mask,
        batch.row_weight,
        batch.ref_logp,
        entropy,
        None if batch.selected is None else batch.selected.bool(),
        batch.sampler_logp,
        ratio,
        lengths,
    )
    result = _empty_result(logp, num_rows if cfg.entropy_coef else 0)
    programs = max(1, (num_rows + BLOCK - 1) // BLOCK)
    sums = torch.empty(programs, SLOTS, dtype=torch.float64, device=logp.device)
    is_tensor = isinstance(count, torch.Tensor)
    inverse = 1.0 if is_tensor or count is None else 1.0 / max(count, 1.0)
    if cfg.aggregation == "seq-mean-token-sum-norm" and cfg.norm_length is not None:
        inverse /= cfg.norm_length
    with torch.cuda.device_of(logp):
        _kernel[(programs,)](
            *(None if tensor is None else tensor.contiguous() for tensor in vectors),
            count if is_tensor else None,
            result.d_logp,
            result.d_entropy if cfg.entropy_coef else None,
            result.loss,
            result.metrics,
            result.scale,
            sums,
            torch.zeros(1, dtype=torch.int32, device=logp.device),
            num_rows,
            inverse,
            cfg.clip_low,
            cfg.clip_high,
            cfg.dual_clip or 0.0,
            cfg.kl_cov_coef,
            cfg.kl_coef,
            cfg.entropy_coef,
            cfg.tis_cap or 0.0,
            KIND=KINDS.index(cfg.kind),
            KL_KIND=KL_KINDS.index(cfg.kl_kind),
            HAS_DUAL_CLIP=cfg.dual_clip is not None,
            OWN_COUNT=count is None,
            BLOCK=BLOCK,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )
    if cov is not None:
        result.metrics[-len(QUANTILES) :] = covariance_quantiles(cov, batch.mask, torch.float32)
    return result


def _empty_result(logp: torch.Tensor, num_entropies: int) -> Evaluation:
    """Float32 outputs that the kernel fills."""
    sizes = ((), (len(METRICS),), (len(logp),), (num_entropies,), ())
    return Evaluation(*(torch.empty(size, dtype=torch.float32, device=logp.device) for size in sizes))
