"""`linear_policy_loss`: loss, metrics and gradients from hidden states in one sweep over row chunks, 6 NVH FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spear_kernels.autocast import autocast_inputs
from spear_kernels.backend import resolve_backend
from spear_kernels.checks import compute_dtype, host_may_wait, integers
from spear_kernels.cov_select.op import all_rows
from spear_kernels.linear_logprob import linear_logprob
from spear_kernels.linear_logprob.head import check_head, chunk_budget
from spear_kernels.linear_logprob.op import head_settings
from spear_kernels.linear_policy_loss.library import Swept, linear_policy_sweep, may_stay_idle
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import Count, PolicyBatch, TokenInputs
from spear_kernels.policy_loss.metrics import QUANTILES, covariance_quantiles
from spear_kernels.policy_loss.op import policy_loss
from spear_kernels.results import LinearPolicyLossResult, LogProbs, PolicyLossResult
from spear_kernels.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Head:
    """What produces the logits: hidden [N, H], weight [V, H], bias [V], ids int64 [N], and how."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    temperature: float | torch.Tensor
    softcap: float | None
    vocab_size: int | None
    group: ProcessGroup | None
    vocab_offset: int | None
    chunk_bytes: int | None
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of log-probs."""
        return compute_dtype(self.hidden, self.weight)

    def wanted(self) -> list[bool]:
        """Which of hidden, weight and bias want a gradient in the present grad mode."""
        if not torch.is_grad_enabled():
            return [False] * 3
        inputs = self.hidden, self.weight, self.bias
        return [tensor is not None and tensor.requires_grad for tensor in inputs]

    def logprob(self, mask: torch.Tensor | None) -> LogProbs:
        """Differentiable log-probs and entropies, 0 where mask [N] is False."""
        return linear_logprob(
            self.hidden,
            self.weight,
            self.ids,
            self.temperature,
            bias=self.bias,
            mask=mask,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
            group=self.group,
            vocab_offset=self.vocab_offset,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )

    def sweep(
        self, mask: torch.Tensor | None, live: torch.Tensor | None, inputs: TokenInputs, cfg: PolicyLossConfig
    ) -> Swept:
        """Log-probs, entropies and gradients in one go."""
        width = len(self.weight)
        shard = VocabShard.of(self.group, self.vocab_offset, width)
        scaling = Scaling.of(self.temperature, self.softcap, self.vocab_size, self.hidden, width, self.dtype, shard)
        budget = chunk_budget(self.chunk_bytes, self.hidden.device)
        settings = head_settings(scaling, shard, budget, resolve_backend(self.backend, self.hidden, self.weight))
        swept = linear_policy_sweep(
            self.hidden,
            self.weight,
            self.bias,
            self.ids,
            mask,
            *settings,
            live,
            inputs.old_logp,
            inputs.advantages,
            inputs.mask,
            inputs.aggregation_weight,
            inputs.row_weight,
            inputs.ref_logp,
            inputs.selected,
            cfg.kind,
            cfg.aggregation,
            cfg.kl_kind,
            cfg.numbers(),
            self.wanted(),
        )
        return Swept(*swept)


def _host_side_live(batch: PolicyBatch, cfg: PolicyLossConfig) -> torch.Tensor | None:
    """Rows that may have a gradient, bool [N], if advantages on the CPU say so; None if all may or nobody knows."""
    return batch.advantages != 0 if may_stay_idle(cfg) and host_may_wait(batch.advantages) else None


def _evaluate(
    logp: torch.Tensor, entropy: torch.Tensor, batch: PolicyBatch, cfg: PolicyLossConfig, backend: str
) -> PolicyLossResult:
    return policy_loss(
        logp,
        batch.old_logp,
        batch.advantages,
        batch.mask,
        cfg,
        batch.seq_ids,
        entropy,
        batch.ref_logp,
        batch.row_weight,
        batch.seed,
        positions=batch.positions,
        selected=batch.selected,
        num_tokens=batch.num_tokens,
        num_seqs=batch.num_seqs,
        sampler_logp=batch.sampler_logp,
        backend=backend,
    )


def _token_local(
    head: _Head, mask: torch.Tensor | None, live: torch.Tensor | None, batch: PolicyBatch, cfg: PolicyLossConfig
) -> LinearPolicyLossResult:
    """The one-shot path; a missing covariance choice costs one more forward sweep, 2 NVH."""
    quantiles = {}
    with torch.no_grad():
        if cfg.uses_covariance and batch.selected is None:
            logp = head.logprob(mask).logp
            batch, cov = batch.with_selection(logp, cfg)
            if cov is not None:
                values = covariance_quantiles(cov, batch.mask, head.dtype)
                quantiles = dict(zip(QUANTILES, values.unbind(), strict=True))
        inputs = TokenInputs.of(batch, cfg, head.dtype)
    swept = head.sweep(mask, live, inputs, cfg)
    with torch.no_grad():
        result = _evaluate(swept.logp, swept.entropy, batch, cfg, head.backend)
    return LinearPolicyLossResult(result.loss + swept.anchor, result.metrics | quantiles, swept.logp, swept.entropy)


def _sequence_level(
    head: _Head, mask: torch.Tensor | None, batch: PolicyBatch, cfg: PolicyLossConfig
) -> LinearPolicyLossResult:
    """GSPO: a token's coefficient depends on its whole sequence, so logits are kept or computed again."""
    logp, entropy = head.logprob(mask)
    result = _evaluate(logp, entropy, batch, cfg, head.backend)
    return LinearPolicyLossResult(result.loss, result.metrics, logp.detach(), entropy.detach())


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    seed: int = 0,
    *,
    bias: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    num_tokens: Count | None = None,
    num_seqs: Count | None = None,
    sampler_logp: torch.Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_offset: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LinearPolicyLossResult:
    """`policy_loss` of the log-probs that hidden states and a head give to `ids`, differentiable in the head's inputs.

    hidden [N, H], weight [V, H], bias [V], any float type; ids int64 [N]; temperature, softcap, vocab_size, group,
    vocab_offset and chunk_bytes as in `linear_logprob` (here one all-gather per chunk), the other arguments as in
    `policy_loss`. Result: `policy_loss`'s loss and metrics, and detached logp, entropy [N], 0 where masked out. Rows
    with mask False may hold anything, also NaN.

    What never costs a product: rows that `mask` leaves out, and in the backward products rows whose coefficient is 0
    (zero advantage, clipped, dropped by Clip-Cov). On the CPU all of that is seen. On a device the host does not
    wait: leave mask and advantages on the CPU, where they were made, and both are planned before any launch. With
    mask or advantages on the device, the Triton backend counts rows there and its products stop at the count, for
    token-local losses, without a group, if hidden and weight are both bfloat16 or both float32; else such rows pass as
    zeros.

    FLOPs with N action tokens, of which a share g has a gradient: (2 + 4 g) NVH for a token-local loss; 2 NVH more
    when Clip-Cov or KL-Cov must choose its tokens here because `selected` is None; for "gspo", whose coefficients need
    whole sequences, the costs of `linear_logprob`. A frozen weight saves 2 g NVH, no gradient wanted leaves 2 NVH.
    Gradients are computed in the forward call and kept: the size of hidden, and of weight in float32. The first
    backward scales and hands them over; another one (retain_graph) computes them again. There are no second
    derivatives.

    Raises:
        ValueError: wrong shape, an argument that `cfg` needs is missing, an argument out of range, or a backend that
            cannot run here.
    """
    check_head(hidden, weight, bias, ids)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    mask = None if mask is None else mask.bool()
    given = PolicyBatch(
        old_logp,
        advantages,
        all_rows(mask, old_logp),
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
    batch = given.check(len(hidden), cfg, has_entropy=True, device=hidden.device)
    ids = integers(ids, hidden.device)
    scaled = (temperature, softcap, vocab_size)
    head = _Head(hidden, weight, bias, ids, *scaled, group, vocab_offset, chunk_bytes, backend)
    if cfg.kind == "gspo":
        return _sequence_level(head, mask, batch, cfg)
    return _token_local(head, mask, _host_side_live(given, cfg), batch, cfg)
