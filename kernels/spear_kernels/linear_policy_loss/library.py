"""The torch.library operator behind `linear_policy_loss`: gradients are computed with the values and kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from spear_kernels.autocast import without_autocast
from spear_kernels.checks import compute_dtype, host_may_wait, refuse_second_derivatives
from spear_kernels.linear_logprob.counted import can_count
from spear_kernels.linear_logprob.head import Head
from spear_kernels.linear_logprob.op import (
    HEAD_SCHEMA,
    NUM_HEAD_ARGUMENTS,
    Settings,
    fake_gradients,
    filled,
    gradients_of_type,
    head_rows,
    linear_gradient,
)
from spear_kernels.linear_logprob.plan import RowPlan
from spear_kernels.linear_logprob.sums import GradientSums
from spear_kernels.linear_policy_loss.sweep import Skipping, sweep
from spear_kernels.policy_loss.config import NUMBERS, PolicyLossConfig, config_of
from spear_kernels.policy_loss.inputs import TokenInputs

_LOSS_SCHEMA = (
    "Tensor? live, Tensor old_logp, Tensor advantages, Tensor action, Tensor aggregation_weight, Tensor? row_weight, "
    "Tensor? ref_logp, Tensor? selected, str kind, str aggregation, str kl_kind, float[] numbers, bool[] wanted"
)
_NUM_ARGUMENTS = NUM_HEAD_ARGUMENTS + _LOSS_SCHEMA.count(",") + 1


class Swept(NamedTuple):
    """What one sweep gives; rows that did not enter hold 0."""

    anchor: torch.Tensor  # 0-d, always 0; its derivative in hidden, weight and bias is that of the loss
    logp: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]
    saved: torch.Tensor  # [4, N], statistics
    d_logp: torch.Tensor  # [N]
    d_entropy: torch.Tensor  # [N], or [0] without an entropy term
    d_hidden: torch.Tensor  # [N, H], or [0] if not wanted, as the next two
    d_weight: torch.Tensor  # [V, H] float32 or float64
    d_bias: torch.Tensor  # [V] float32 or float64


@torch.library.custom_op(
    "spear_kernels::linear_policy_sweep",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, {_LOSS_SCHEMA}) -> ({', '.join('Tensor' for _ in Swept._fields)})",
)
@without_autocast
def linear_policy_sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and the gradients of the loss; `live` is a host-side guess of rows with a gradient."""
    settings: Settings = tuple(rest[: NUM_HEAD_ARGUMENTS - 5])
    live, old_logp, advantages, action, weights, row_weight, ref_logp, selected, *names, numbers, wanted = rest[
        NUM_HEAD_ARGUMENTS - 5 :
    ]
    cfg = config_of(*names, tuple(numbers))
    plan = RowPlan.of(mask, live, len(ids), hidden.device)
    unplanned = live is None and may_stay_idle(cfg)
    by_device = any(wanted) and _counts_on_device(hidden, weight, bias, settings, plan, unplanned)
    plan = plan.counted() if by_device else plan
    rows = head_rows(hidden, weight, bias, ids, settings, plan)
    skipping = Skipping(plan.num_live if any(wanted) else 0, plan.count, by_device)
    inputs = TokenInputs(old_logp, advantages, action, weights, row_weight, ref_logp, selected)
    inputs = inputs if plan.index is None else inputs.rows(plan.index)
    sums = GradientSums.zeros(rows.head, hidden, weight, rows.shard, wanted)
    table, d_logp, d_entropy = sweep(rows, skipping, inputs, cfg, sums)
    table, d_logp = plan.spread(table), plan.spread(d_logp)
    d_entropy = plan.spread(d_entropy) if cfg.entropy_coef else d_entropy
    anchor = table.new_zeros(())
    gradients = filled(sums.finish(hidden, rows.shard), hidden)
    return Swept(anchor, table[0].clone(), table[1].clone(), table, d_logp, d_entropy, *gradients)


def may_stay_idle(cfg: PolicyLossConfig) -> bool:
    """Whether a row of advantage 0 has no gradient: only the surrogate gives one."""
    return not (cfg.entropy_coef or cfg.kl_coef or cfg.kind == "kl_cov")


def _counts_on_device(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: Settings,
    plan: RowPlan,
    unplanned: bool,
) -> bool:
    """Whether rows that the host does not know to be idle are counted on the device, rather than multiplied as zeros.

    `unplanned`: there may be rows without a gradient, and nobody has looked for them.
    """
    *_, vocab_size, group, _, _, _, backend = settings
    if backend != "triton" or group or host_may_wait(hidden) or (plan.unknown is None and not unplanned):
        return False
    return can_count(Head.of(hidden, weight, bias, vocab_size, len(weight)), hidden)


@linear_policy_sweep.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, *rest: Any) -> Swept:
    numbers, wanted = rest[-2:]
    num_rows, dtype = ids.shape[0], compute_dtype(hidden, weight)

    def empty(*shape: int) -> torch.Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    has_entropy_term = numbers[NUMBERS.index("entropy_coef")] != 0
    vectors = empty(num_rows), empty(num_rows), empty(4, num_rows), empty(num_rows)
    return Swept(empty(), *vectors, empty(num_rows if has_entropy_term else 0), *fake_gradients(hidden, weight, wanted))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    swept = Swept(*output)
    hidden, weight, bias, ids, mask, temperature, *settings = inputs[:NUM_HEAD_ARGUMENTS]
    ctx.save_for_backward(hidden, weight, bias, ids, mask, temperature, swept.saved, swept.d_logp, swept.d_entropy)
    ctx.settings, ctx.wanted = tuple(settings), inputs[-1]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.gradients = [(swept.d_hidden, swept.d_weight, swept.d_bias)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _hand_over(ctx: Any, factor: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    """Multiply the gradients on the device, in place, and give them away; a second backward computes them again."""
    if factor is None:
        return (None,) * _NUM_ARGUMENTS
    refuse_second_derivatives("linear_policy_loss")
    if ctx.gradients:
        # What was saved is not asked for: under activation checkpointing that would run the whole sweep again.
        kept = ctx.gradients.pop()
        scaled = tuple(_scaled(gradient, factor, dtype) for gradient, dtype in zip(kept, ctx.dtypes, strict=True))
    else:
        *tensors, temperature, saved, d_logp, d_entropy = ctx.saved_tensors
        entropy_part = d_entropy * factor if d_entropy.shape == d_logp.shape else None
        scaled = linear_gradient(*tensors, temperature, *ctx.settings, saved, d_logp * factor, entropy_part, ctx.wanted)
    return *gradients_of_type(scaled, ctx.dtypes, ctx.wanted), *(None,) * (_NUM_ARGUMENTS - 3)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """gradient * factor in `dtype`."""
    if type(gradient) is not torch.Tensor:
        # A compiler traces this: it plans memory itself, and an output of the forward may not change.
        return gradient * factor
    if dtype is None or gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


linear_policy_sweep.register_autograd(_hand_over, setup_context=_keep_gradients)
