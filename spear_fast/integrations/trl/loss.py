"""The policy loss of one optimizer step in micro-batches: denominators and covariance choice first, then each loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from spear_kernels import (
    PolicyInputs,
    PolicyLossConfig,
    covariance_metrics,
    covariance_select,
    join_metrics,
    policy_loss,
)

from .batches import TokenBatch, joined_tokens

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = dict[str, torch.Tensor]


@dataclass
class StepPlan:
    """What the micro-batches of one optimizer step share."""

    cfg: PolicyLossConfig
    counts: torch.Tensor  # float64 [2]: action tokens and sequences of all ranks, divided by the number of ranks
    temperature: float
    seed: int
    selected: list[torch.Tensor] | None
    """Per micro-batch the tokens that Clip-Cov or KL-Cov chose, bool [B, L]; None: not needed, or left to the loss."""
    covariance: Metrics


@dataclass
class ExtraTerms:
    """TRL's terms outside the surrogate; either one needs log-probs with a graph, so they exclude the one-shot loss."""

    entropy_coef: float = 0.0
    aux_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, already divided by the number of micro-batches."""

    @property
    def any(self) -> bool:
        return self.entropy_coef != 0.0 or self.aux_coef != 0.0


def plan_step(
    model: Any,
    batches: Sequence[TokenBatch],
    cfg: PolicyLossConfig,
    stats: str,
    accelerator: Accelerator,
    temperature: float,
    seed: int,
    logps: Sequence[torch.Tensor] | None = None,
) -> StepPlan:
    """Count all ranks' tokens and, for the covariance losses, choose tokens over all micro-batches and ranks.

    The choice needs the log-probs under the present weights: `logps` [B, L] of each batch if they are known, else one
    more forward pass. A batch without `old_logp` then gets these as its own, unless that pass drew random numbers: the
    loss would see another dropout mask, and ratios other than 1. With stats="microbatch", and where there is one
    micro-batch on one rank, the loss chooses by itself.
    """
    counts = torch.stack([batch.counts() for batch in batches]).sum(0)
    counts = accelerator.reduce(counts, reduction="sum") / accelerator.num_processes
    several = len(batches) > 1 or accelerator.num_processes > 1
    if not cfg.uses_covariance or stats == "microbatch" or not several:
        return StepPlan(cfg, counts, temperature, seed, None, {})
    repeatable = True
    if logps is None:
        before = _random_state(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            logps = [_score(model, batch, temperature).logp for batch in batches]
        repeatable = torch.equal(before, _random_state(accelerator.device))
    old_logps = [logp if batch.old_logp is None else batch.old_logp for batch, logp in zip(batches, logps, strict=True)]
    if repeatable:
        for batch, old_logp in zip(batches, old_logps, strict=True):
            batch.old_logp = old_logp
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    logp, advantages = joined_tokens(batches, logps), joined_tokens(batches, [batch.advantages for batch in batches])
    chosen = covariance_select(
        logp,
        joined_tokens(batches, old_logps),
        advantages,
        None,
        cfg,
        joined_tokens(batches, [batch.uid for batch in batches]),
        seed,
        positions=joined_tokens(batches, [batch.positions for batch in batches]),
        row_weight=joined_tokens(batches, [batch.weights for batch in batches]),
        group=group,
    )
    parts = chosen.split([len(batch.places) for batch in batches])
    selected = [
        torch.zeros_like(batch.mask).masked_scatter(batch.mask, part)
        for batch, part in zip(batches, parts, strict=True)
    ]
    covariance = covariance_metrics(logp, advantages, None, group=group)
    return StepPlan(cfg, counts, temperature, seed, selected, covariance)


def micro_batch_loss(
    model: Any, batch: TokenBatch, plan: StepPlan, index: int, extra: ExtraTerms | None = None
) -> tuple[torch.Tensor, Metrics, torch.Tensor]:
    """The share of micro-batch `index` in the step's loss, its metrics, and detached log-probs [B, L].

    Averaged over ranks, as DDP does, the shares add up to the loss of the whole step. Where `old_logp` is known
    and `extra` empty, `linear_policy_loss` does everything in one sweep; else log-probs come first.
    """
    selected = None if plan.selected is None else plan.selected[index]
    if batch.old_logp is None or (extra is not None and extra.any):
        return _from_logp(model, batch, plan, selected, extra or ExtraTerms())
    num_tokens, num_seqs = plan.counts.unbind()
    inputs = PolicyInputs(
        batch.labels,
        batch.old_logp,
        batch.advantages,
        plan.cfg,
        temperature=plan.temperature,
        seq_ids=batch.uid,
        positions=batch.positions,
        ref_logp=batch.ref_logp,
        row_weight=batch.row_weight,
        selected=selected,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        seed=plan.seed,
    )
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, policy_inputs=inputs)
    return output.loss, output.metrics, output.logp


def _from_logp(
    model: Any, batch: TokenBatch, plan: StepPlan, selected: torch.Tensor | None, extra: ExtraTerms
) -> tuple[torch.Tensor, Metrics, torch.Tensor]:
    """`micro_batch_loss` by way of differentiable log-probs and entropies."""
    output = _score(model, batch, plan.temperature, with_router=extra.aux_coef != 0.0)
    num_tokens, num_seqs = plan.counts.unbind()
    old_logp = output.logp.detach() if batch.old_logp is None else batch.old_logp
    given = {"ref_logp": batch.ref_logp, "row_weight": batch.row_weight, "selected": selected}
    optional: dict[str, Any] = {name: batch.tokens(value) for name, value in given.items() if value is not None}
    result = policy_loss(
        batch.tokens(output.logp),
        batch.tokens(old_logp),
        batch.tokens(batch.advantages),
        None,
        plan.cfg,
        batch.tokens(batch.uid),
        batch.tokens(output.entropy),
        seed=plan.seed,
        positions=batch.tokens(batch.positions),
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        **optional,
    )
    loss = result.loss
    if extra.entropy_coef:
        loss = loss - extra.entropy_coef * output.entropy.sum() / num_tokens.clamp(min=1)
    if extra.aux_coef:
        loss = loss + extra.aux_coef * output.aux_loss
    return loss, result.metrics, output.logp.detach()


def joined(parts: Sequence[Metrics], plan: StepPlan, accelerator: Accelerator) -> dict[str, float]:
    """Metrics of the step from the plan and those of its micro-batches, over all ranks; waits for the device once.

    `loss` and `policy_loss` are divided by the number of ranks, since their denominators were multiplied by it.
    """
    own = join_metrics(parts)
    table = accelerator.gather(torch.stack([value.float() for value in own.values()])[None])
    total = {**join_metrics([dict(zip(own, row.unbind(), strict=True)) for row in table]), **plan.covariance}
    values = dict(zip(total, torch.stack([value.float() for value in total.values()]).tolist(), strict=True))
    return {name: value / len(table) if name in ("loss", "policy_loss") else value for name, value in values.items()}


def _score(model: Any, batch: TokenBatch, temperature: float, with_router: bool = False) -> Any:
    # Looked for before anything is launched that it would wait for.
    _ = batch.places
    inputs = PolicyInputs(batch.labels, temperature=temperature)
    router = {"output_router_logits": True} if with_router else {}
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, policy_inputs=inputs, **router)


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of the current device's generator; a GPU's is kept on the host, so nothing waits."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
