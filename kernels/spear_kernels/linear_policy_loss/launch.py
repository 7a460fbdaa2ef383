"""Launches the one-shot kernel of `linear_policy_loss`: statistics, derivatives of the loss, gradient of logits."""

from __future__ import annotations

import torch

from spear_kernels.linear_policy_loss.kernel import sweep_kernel
from spear_kernels.logprob.launch import aligned, check_out, check_rows, launch_rows, shared_bytes, vector
from spear_kernels.tile import row_launch


def sweep_rows(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    aggregation_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    selected: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_cov_coef: float,
    kl_coef: float,
    entropy_coef: float,
    kind: int,
    kl_kind: int,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics float32 [4, n] as `row_statistics`, and the loss's derivatives d_logp and d_entropy, float32 [n] each.

    logits to vocab_size as in `row_statistics`; old_logp, advantages, aggregation_weight, row_weight, ref_logp [n] of
    any float type; selected bool [n]; the numbers as in `PolicyLossConfig`; kind and kl_kind index KINDS and KL_KINDS,
    but not "gspo", which is not token-local. `out` [n, V] receives the gradient of the loss with respect to the raw
    logits: `logits` itself, separate memory of any of their types, or None for no gradient.

    A row with aggregation_weight 0 is masked out: not read, statistics, derivatives and gradient 0.

    Raises:
        ValueError: a matrix whose columns are not adjacent in memory, another dtype, a vocab_size out of range, or an
            `out` of another shape or in partly the same memory.
    """
    check_rows("logits", logits, vocab_size)
    if out is not None:
        check_out(logits, out, vocab_size)
    num_rows, device = len(logits), logits.device
    statistics = torch.empty(4, num_rows, dtype=torch.float32, device=device)
    d_logp, d_entropy = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    launch_rows(
        sweep_kernel,
        logits,
        row_launch(vocab_size, logits.element_size(), 1 if out is None else 2, shared_bytes(device)),
        ids.contiguous(),
        vector(temperature),
        vector(old_logp),
        vector(advantages),
        vector(aggregation_weight),
        vector(row_weight),
        vector(ref_logp),
        None if selected is None else selected.contiguous().view(torch.uint8),
        statistics,
        d_logp,
        d_entropy,
        out,
        float(temperature_value),
        float(softcap),
        float(clip_low),
        float(clip_high),
        float(dual_clip or 0),
        float(kl_cov_coef),
        float(kl_coef),
        float(entropy_coef),
        num_rows,
        logits.stride(0),
        0 if out is None else out.stride(0),
        vocab_size,
        logits.shape[1],
        KIND=kind,
        KL_KIND=kl_kind,
        HAS_DUAL_CLIP=dual_clip is not None,
        HAS_ENTROPY=entropy_coef != 0,
        HAS_SOFTCAP=softcap != 0,
        ALIGNED=aligned(logits, out),
    )
    return statistics, d_logp, d_entropy
