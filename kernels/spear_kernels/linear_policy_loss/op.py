"""`linear_policy_loss`: loss, metrics and gradients from hidden states in one sweep over row chunks, 6 NVH FLOPs.

For a loss that is local to tokens the coefficient of a row is known as soon as its log-prob is, so its logits are
turned into their gradient while they are at hand, instead of being computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import host_may_wait, require_shape
from spear_kernels.gradient import attach_gradient
from spear_kernels.linear_logprob import DEFAULT_CHUNK_BYTES, linear_logprob
from spear_kernels.linear_logprob.head import GradientSums, Head, check_chunk_bytes, chunks, logits_statistics
from spear_kernels.logprob.temperature import Temperature
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import Count, PolicyBatch, TokenInputs
from spear_kernels.policy_loss.op import loss_and_terms, policy_loss
from spear_kernels.policy_loss.terms import token_terms
from spear_kernels.results import LinearPolicyLossResult, LogProbs


@dataclass(frozen=True)
class _HeadProblem:
    """What produces the logits of the rows at hand: hidden [N, H], weight [V, H], bias [V], ids int64 [N]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    temperature: Temperature
    chunk_bytes: int

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.hidden, self.weight, self.bias

    def wanted(self) -> tuple[bool, bool, bool]:
        """Which inputs want a gradient in the present grad mode."""
        if not torch.is_grad_enabled():
            return False, False, False
        hidden, weight, bias = (tensor is not None and tensor.requires_grad for tensor in self.inputs)
        return hidden, weight, bias

    def logprob(self) -> LogProbs:
        """Differentiable log-probs and entropies of all rows."""
        return linear_logprob(
            self.hidden,
            self.weight,
            self.ids,
            self.temperature.value,
            bias=self.bias,
            chunk_bytes=self.chunk_bytes,
        )

    def active(self, mask: torch.Tensor) -> tuple[_HeadProblem, torch.Tensor | None]:
        """The problem of the rows where mask is True, and their indices; None if all rows are kept.

        Off the CPU the number of active rows is not known to the host: rows are neutralised and not removed.
        """
        if not host_may_wait(mask):
            hidden, ids = self.hidden.masked_fill(~mask[:, None], 0), torch.where(mask, self.ids, 0)
            return replace(self, hidden=hidden, ids=ids, temperature=self.temperature.where(mask)), None
        rows = mask.nonzero()[:, 0]
        if len(rows) == len(mask):
            return self, None
        part = replace(self, hidden=self.hidden[rows], ids=self.ids[rows], temperature=self.temperature.rows(rows))
        return part, rows


def _one_shot(
    problem: _HeadProblem, inputs: TokenInputs, cfg: PolicyLossConfig, wanted: tuple[bool, bool, bool]
) -> tuple[LogProbs, GradientSums]:
    """Log-probs and entropies [N], and the gradients of the loss in hidden, weight and bias."""
    head = Head.of(*problem.inputs)
    num_rows = len(problem.ids)
    sums = GradientSums.zeros(head, problem.hidden, wanted)
    logp, entropy = (torch.empty(num_rows, dtype=head.dtype, device=problem.hidden.device) for _ in range(2))
    buffer = head.buffer(num_rows, problem.chunk_bytes)
    for rows in chunks(num_rows, head.vocab_size, head.dtype, problem.chunk_bytes):
        x, ids, temperature = problem.hidden[rows].to(head.dtype), problem.ids[rows], problem.temperature.rows(rows)
        z = head.logits(x, temperature, buffer)
        stats = logits_statistics(z, ids)
        logp[rows], entropy[rows] = stats.logp, stats.entropy
        if any(wanted):
            terms = token_terms(stats.logp, inputs.rows(rows), cfg)
            d_entropy = None if terms.d_entropy is None else temperature.scale(terms.d_entropy)
            sums.add(rows, x, z, ids, stats, temperature.scale(terms.d_logp), d_entropy)
    return LogProbs(logp, entropy), sums


def _spread(values: torch.Tensor, rows: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Put the active rows of `values` back at their places among all, zeros where mask [N] is False."""
    if rows is None:
        return values.masked_fill_(~mask.reshape(-1, *(1 for _ in values.shape[1:])), 0)
    return values.new_zeros(len(mask), *values.shape[1:]).index_copy_(0, rows, values)


def _token_local(problem: _HeadProblem, batch: PolicyBatch, cfg: PolicyLossConfig) -> LinearPolicyLossResult:
    """The one-shot path; a missing covariance choice costs one more forward sweep, 2 NVH."""
    wanted = problem.wanted()
    with torch.no_grad():
        active, rows = problem.active(batch.mask)
        part, cov = batch if rows is None else batch.take(rows), None
        if cfg.uses_covariance and batch.selected is None:
            part, cov = part.with_selection(active.logprob().logp, cfg)
        inputs = TokenInputs.of(part, cfg, Head.of(*problem.inputs).dtype)
        (logp, entropy), sums = _one_shot(active, inputs, cfg, wanted)
        result, _ = loss_and_terms(logp, entropy, part, cfg, cov)
        d_hidden = None if sums.hidden is None else _spread(sums.hidden, rows, batch.mask)
        logp, entropy = _spread(logp, rows, batch.mask), _spread(entropy, rows, batch.mask)
    loss = attach_gradient(result.loss, problem.inputs, (d_hidden, sums.weight, sums.bias))
    return LinearPolicyLossResult(loss, result.metrics, logp, entropy)


def _sequence_level(problem: _HeadProblem, batch: PolicyBatch, cfg: PolicyLossConfig) -> LinearPolicyLossResult:
    """GSPO: a token's coefficient depends on its whole sequence, so logits are recomputed in the backward pass."""
    active, rows = problem.active(batch.mask)
    part = batch if rows is None else batch.take(rows)
    logp, entropy = active.logprob()
    result = policy_loss(
        logp,
        part.old_logp,
        part.advantages,
        part.mask,
        cfg,
        part.seq_ids,
        entropy,
        part.ref_logp,
        part.row_weight,
        num_tokens=part.num_tokens,
        num_seqs=part.num_seqs,
    )
    with torch.no_grad():
        logp, entropy = _spread(logp.clone(), rows, batch.mask), _spread(entropy.clone(), rows, batch.mask)
    return LinearPolicyLossResult(result.loss, result.metrics, logp, entropy)


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
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
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str = "auto",
) -> LinearPolicyLossResult:
    """`policy_loss` of the log-probs that hidden states and a head give to `ids`, differentiable in the head's inputs.

    hidden [N, H], weight [V, H], bias [V], any float type; ids int64 [N]; temperature a number or [N]; the other
    arguments as in `policy_loss`. Rows with mask False are never multiplied (CPU) and may hold anything, also NaN.
    Result: `policy_loss`'s loss and metrics, and detached logp, entropy [N], 0 where masked out.

    FLOPs with N action tokens, of which a share g has a gradient: (2 + 4 g) NVH for a token-local loss; 2 NVH more
    when Clip-Cov or KL-Cov must choose its tokens here because `selected` is None; (4 + 4 g) NVH for "gspo". A frozen
    weight saves 2 g NVH, no gradient wanted leaves 2 NVH. Gradients are computed in the forward call and kept: the
    size of hidden, and of weight in float32. Beyond them at most `chunk_bytes` of logits exist.

    Raises:
        ValueError: wrong shape, an argument that `cfg` needs is missing, temperature <= 0, chunk_bytes < 1, or a
            backend that is not available.
    """
    resolve_backend(backend)
    dtype = Head.of(hidden, weight, bias).dtype
    require_shape("ids", ids, (len(hidden),))
    check_chunk_bytes(chunk_bytes)
    batch = PolicyBatch(
        old_logp, advantages, mask, seq_ids, ref_logp, row_weight, positions, selected, num_tokens, num_seqs, seed
    ).check(len(hidden), cfg, has_entropy=True)
    scale = Temperature.of(temperature, len(hidden), dtype)
    problem = _HeadProblem(hidden, weight, bias, ids.long(), scale, chunk_bytes)
    run = _sequence_level if cfg.kind == "gspo" else _token_local
    return run(problem, batch, cfg)
