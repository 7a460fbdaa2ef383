"""The torch.library operator behind `policy_loss`: opaque to compilers, differentiable, one node for any N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spear_kernels.checks import compute_dtype
from spear_kernels.cov_select.draw import signed_word
from spear_kernels.policy_loss.config import NUMBERS, PolicyLossConfig, config_of
from spear_kernels.policy_loss.evaluate import evaluate
from spear_kernels.policy_loss.inputs import Count, PolicyBatch
from spear_kernels.policy_loss.metrics import METRICS

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("spear_kernels::policy_loss", mutates_args=())
def policy_loss_op(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    seq_ids: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    positions: torch.Tensor | None,
    selected: torch.Tensor | None,
    sampler_logp: torch.Tensor | None,
    count: torch.Tensor | None,
    count_int: int | None,
    seed: int,
    kind: str,
    aggregation: str,
    kl_kind: str,
    numbers: Sequence[float],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (0-d), METRICS [M], unscaled d_logp [N], d_entropy [N] or [0], and their scale (0-d)."""
    cfg = config_of(kind, aggregation, kl_kind, tuple(numbers))
    given: Count | None = count_int if count is None else count
    num_tokens, num_seqs = (given, None) if aggregation == "token-mean" else (None, given)
    batch = PolicyBatch(
        old_logp,
        advantages,
        mask,
        seq_ids,
        ref_logp,
        row_weight,
        positions,
        selected,
        num_tokens,
        num_seqs,
        seed,
        sampler_logp,
    )
    loss, metrics, d_logp, d_entropy, scale = evaluate(logp, entropy, batch, cfg, backend)
    return loss, metrics, d_logp, d_entropy, scale


@policy_loss_op.register_fake
def _(logp: torch.Tensor, entropy: torch.Tensor | None, *rest: Any) -> Outputs:
    dtype, num_rows = compute_dtype(logp), logp.shape[0]  # len() would fix a symbolic size
    shapes = ((), (len(METRICS),), (num_rows,), (num_rows if _has_entropy_gradient(rest) else 0,), ())
    loss, metrics, d_logp, d_entropy, scale = (logp.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, metrics, d_logp, d_entropy, scale


def _has_entropy_gradient(arguments: tuple[Any, ...]) -> bool:
    """Whether entropy_coef, in `numbers`, is not 0."""
    return arguments[-2][NUMBERS.index("entropy_coef")] != 0


def _keep_coefficients(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logp, entropy = inputs[:2]
    ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
    ctx.num_inputs = len(inputs)
    ctx.has_entropy_gradient = _has_entropy_gradient(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _scale_coefficients(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    wants_logp, wants_entropy = (wanted and grad_loss is not None for wanted in ctx.needs_input_grad[:2])
    grad_logp = grad_entropy = None
    if wants_logp or wants_entropy:
        d_logp, d_entropy, scale = ctx.saved_tensors
        # The product stays on the device, and in the wider type until after it: no host sync, one rounding.
        factor = grad_loss * scale
        grad_logp = (d_logp * factor).to(ctx.dtypes[0]) if wants_logp else None
        if wants_entropy and ctx.has_entropy_gradient:
            grad_entropy = (d_entropy * factor).to(ctx.dtypes[1])
    return grad_logp, grad_entropy, *(None,) * (ctx.num_inputs - 2)


policy_loss_op.register_autograd(_scale_coefficients, setup_context=_keep_coefficients)


def policy_loss_operator(
    logp: torch.Tensor, entropy: torch.Tensor | None, batch: PolicyBatch, cfg: PolicyLossConfig, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, 0-d and differentiable in logp and entropy, and detached METRICS [M], for a checked batch."""
    count = batch.num_tokens if cfg.aggregation == "token-mean" else batch.num_seqs
    if isinstance(count, float):
        # A compiler would make one graph for each value of a float, but not of an int or a tensor.
        count = torch.ones((), dtype=torch.float64, device=logp.device) * count
    is_tensor = isinstance(count, torch.Tensor)
    loss, metrics, *_ = policy_loss_op(
        logp,
        entropy,
        batch.old_logp,
        batch.advantages,
        batch.mask,
        batch.seq_ids,
        batch.ref_logp,
        batch.row_weight,
        batch.positions,
        batch.selected,
        batch.sampler_logp,
        count.detach().to(logp.device, non_blocking=True) if is_tensor else None,
        None if is_tensor else count,
        signed_word(batch.seed),
        cfg.kind,
        cfg.aggregation,
        cfg.kl_kind,
        cfg.numbers(),
        backend,
    )
    return loss, metrics
