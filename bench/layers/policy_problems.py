"""Inputs of the losses that begin at log-probs, the plain torch definitions, and the choice of tokens by covariance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.layers.contenders import DUAL_CLIP
from bench.layers.gate import LOG_RATIOS
from bench.layers.problems import Shape, action_mask, draw_advantages
from spear_kernels import PolicyLossConfig

CONFIGS = {
    "ppo": PolicyLossConfig("ppo", clip_high=0.28, dual_clip=DUAL_CLIP),
    "clip_cov": PolicyLossConfig("clip_cov", clip_high=0.28, cov_ratio=0.02, cov_lower=1.0, cov_upper=40.0),
    "kl_cov": PolicyLossConfig("kl_cov", cov_ratio=0.02),
    # The bounds of its paper; each sequence counts the same.
    "gspo": PolicyLossConfig("gspo", clip_low=3e-4, clip_high=4e-4, aggregation="seq-mean-token-mean"),
    # Without a lower bound, as in its paper and in TRL.
    "cispo": PolicyLossConfig("cispo", clip_low=1.0, clip_high=0.28),
}
"""One configuration per kind of loss, of settings that all projects which have it share."""
GATE_SHAPE = {"num_rows": 512, "active": 0.7, "live": 0.5}


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """Per-token inputs [N] of sequences of equal length, so that packed and padded layouts hold the same rows."""

    cfg: PolicyLossConfig
    shape: Shape
    logp: torch.Tensor  # float32 [N], wants a gradient
    old_logp: torch.Tensor  # float32 [N]
    advantages: torch.Tensor  # float32 [N], one value per sequence
    mask: torch.Tensor  # bool [N]
    seq_ids: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N], within the sequence
    num_active: int
    num_live: int

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.logp.device

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The log-probs."""
        return (self.logp,)

    @property
    def rotating_bytes(self) -> int:
        """The per-token inputs without ids and positions."""
        return self.least_bytes(backward=False)

    def least_bytes(self, backward: bool) -> int:
        """The least traffic of a loss: three float32 and a byte per token read, and its gradient written."""
        return self.shape.num_rows * (17 if backward else 13)

    def rotated(self, num_copies: int) -> list[TokenProblem]:
        """This problem and copies of its per-token inputs."""
        names = ("old_logp", "advantages", "mask")
        copies = [
            replace(
                self,
                logp=self.logp.detach().clone().requires_grad_(),
                **{name: getattr(self, name).clone() for name in names},
            )
            for _ in range(num_copies - 1)
        ]
        return [self, *copies]

    def by_sequence(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N] as [sequences, length], the layout of padded batches."""
        return tensor.view(self.shape.num_seqs, self.shape.seq_len)


def make_token_problem(shape: Shape, kind: str, device: torch.device, seed: int = 0) -> TokenProblem:
    """Log-probs of a language model's spread, old ones within 0.15 nat, advantages and mask as for the other levels."""
    random = torch.Generator().manual_seed(seed)
    margin = 4 + 3 * torch.randn(shape.num_rows, generator=random)
    logp = torch.nn.functional.logsigmoid(margin)
    noise = torch.randn(shape.num_rows, generator=random).clamp_(-3, 3)
    mask, advantages = action_mask(shape, drop_last=False), draw_advantages(shape, seed)
    rows = torch.arange(shape.num_rows)
    return TokenProblem(
        CONFIGS[kind],
        shape,
        logp.to(device).clone().requires_grad_(),
        (logp + 0.05 * noise).to(device),
        advantages.to(device),
        mask.to(device),
        (rows // shape.seq_len).to(device),
        (rows % shape.seq_len).to(device),
        int(mask.sum()),
        int((mask & (advantages != 0)).sum()),
    )


def gate_token_problem(kind: str, shape: Shape, device: torch.device, seed: int = 0) -> TokenProblem:
    """A small one with every bound in force, where Clip-Cov takes all candidates, so that no draw decides."""
    problem = make_token_problem(replace(shape, num_seqs=64, **GATE_SHAPE), kind, device, seed)
    if kind == "gspo":
        return problem  # Means of its log-ratios lie on both sides of its narrow bounds already.
    log_ratios = torch.tensor(LOG_RATIOS, device=device).repeat(problem.shape.num_rows)[: problem.shape.num_rows]
    cfg = replace(problem.cfg, cov_ratio=1.0) if kind == "clip_cov" else problem.cfg
    return replace(problem, cfg=cfg, old_logp=problem.logp.detach() - log_ratios)


def covariances(problem: TokenProblem, logp: torch.Tensor) -> torch.Tensor:
    """(A - mean A)(logp - mean logp) over action tokens, in the type of logp [N]; elsewhere without meaning."""
    mask, count = problem.mask, problem.num_active
    advantages = problem.advantages.to(logp.dtype)
    return (advantages - (advantages * mask).sum() / count) * (logp - (logp * mask).sum() / count)


def chosen(problem: TokenProblem, logp: torch.Tensor) -> torch.Tensor:
    """The choice of Clip-Cov or KL-Cov (arXiv 2505.22617) in plain torch, bool [N], from detached logp [N]."""
    cfg, cov = problem.cfg, covariances(problem, logp)
    count = max(1, int(cfg.cov_ratio * problem.num_active))
    choice = torch.zeros_like(problem.mask)
    if cfg.kind == "kl_cov":
        choice[cov.masked_fill(~problem.mask, -torch.inf).topk(count).indices] = True
        return choice
    ratio = (logp - problem.old_logp).exp()
    plain, clipped = -problem.advantages * ratio, -problem.advantages * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    candidates = (problem.mask & (cov > cfg.cov_lower) & (cov < cfg.cov_upper) & ~(clipped > plain)).nonzero()[:, 0]
    choice[candidates[torch.randperm(len(candidates), device=logp.device)[:count]]] = True
    return choice


def plain_loss(problem: TokenProblem) -> torch.Tensor:
    """The loss in plain torch with autograd, 0-d."""
    cfg, logp, advantages = problem.cfg, problem.logp, problem.advantages
    log_ratio = (logp - problem.old_logp).clamp(-20, 20)
    if cfg.kind == "gspo":
        by_sequence = problem.by_sequence(log_ratio * problem.mask).sum(1)
        mean = by_sequence / problem.by_sequence(problem.mask).sum(1)
        log_ratio = logp - logp.detach() + mean.detach().clamp(max=10).repeat_interleave(problem.shape.seq_len)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.kind == "kl_cov":
        losses = -advantages * ratio
        losses = torch.where(chosen(problem, logp.detach()), losses + cfg.kl_cov_coef * log_ratio.abs(), losses)
    elif cfg.kind == "cispo":
        losses = -bounded.detach() * advantages * logp
    else:
        losses = torch.maximum(-advantages * ratio, -advantages * bounded)
    if cfg.kind == "clip_cov":
        losses = losses.masked_fill(chosen(problem, logp.detach()), 0)
    if cfg.dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * cfg.dual_clip), losses)
    if cfg.aggregation == "token-mean":
        return (losses * problem.mask).sum() / problem.num_active
    mask = problem.by_sequence(problem.mask)
    return ((problem.by_sequence(losses) * mask).sum(1) / mask.sum(1)).mean()
