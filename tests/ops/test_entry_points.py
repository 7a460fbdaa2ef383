"""The calls that other programs make: names, order and defaults of the public functions are final."""

from __future__ import annotations

import torch

from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss

N, H, V = 6, 8, 11


def test_every_published_call_works_as_written():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    ids = torch.randint(V, (N,), generator=generator)
    old_logp, advantages = torch.full((N,), -2.0), torch.linspace(-1, 1, N)
    mask, seq_ids = torch.ones(N, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1, 1])

    out = logprob((hidden @ weight.T).detach(), ids, temperature=1.0, backend="auto")
    assert out.logp.shape == out.entropy.shape == (N,) and out.logp.dtype == torch.float32
    out = linear_logprob(hidden, weight, ids, temperature=1.0, backend="auto")
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None

    cfg = PolicyLossConfig(
        kind="clip_cov", clip_low=0.2, clip_high=0.28, dual_clip=10.0, cov_ratio=0.02, cov_lower=1.0, cov_upper=40.0,
        kl_cov_coef=1.0, aggregation="seq-mean-token-sum-norm", norm_length=4096, entropy_coef=0.0, kl_coef=0.0,
        kl_kind="k3",
    )  # fmt: skip
    logp = linear_logprob(hidden, weight, ids).logp
    split = policy_loss(
        logp, old_logp, advantages, mask, cfg, seq_ids=seq_ids, entropy=None, ref_logp=None, row_weight=None, seed=0
    )
    fused = linear_policy_loss(
        hidden, weight, ids, old_logp, advantages, mask, cfg, seq_ids=seq_ids, temperature=1.0, seed=0
    )
    for result in (split, fused):
        assert result.loss.shape == () and result.loss.requires_grad
        assert all(metric.shape == () for metric in result.metrics.values())
    torch.testing.assert_close(fused.loss, split.loss)
