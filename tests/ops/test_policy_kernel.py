"""The Triton code of the policy losses against the torch formulas and float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from spear_kernels.policy_loss.config import KINDS, KL_KINDS, PolicyLossConfig
from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.policy_loss.kernel import token_terms
from spear_kernels.policy_loss.terms import token_terms as torch_terms

NUM_ROWS = 301
FLOATS = ("logp", "old_logp", "advantages", "row_weight", "ref_logp", "sequence_ratio")


@triton.jit
def _terms_kernel(
    floats, selected, out, num_rows, clip_low, clip_high, dual_clip, kl_cov_coef, kl_coef,
    KIND: tl.constexpr, KL_KIND: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    live = row < num_rows
    logp = tl.load(floats + row, mask=live, other=0.0)
    old_logp = tl.load(floats + num_rows + row, mask=live, other=0.0)
    advantage = tl.load(floats + 2 * num_rows + row, mask=live, other=0.0)
    row_weight = tl.load(floats + 3 * num_rows + row, mask=live, other=0.0)
    ref_logp = tl.load(floats + 4 * num_rows + row, mask=live, other=0.0)
    sequence_ratio = tl.load(floats + 5 * num_rows + row, mask=live, other=0.0)
    chosen = tl.load(selected + row, mask=live, other=0) != 0
    policy, kl, d_logp, ratio, low, high, dual = token_terms(
        logp, old_logp, advantage, row_weight, ref_logp, chosen, sequence_ratio,
        clip_low, clip_high, dual_clip, kl_cov_coef, kl_coef, KIND, KL_KIND, HAS_DUAL_CLIP, HAS_REF,
    )  # fmt: skip
    tl.store(out + row, policy, mask=live)
    tl.store(out + num_rows + row, kl, mask=live)
    tl.store(out + 2 * num_rows + row, d_logp, mask=live)
    tl.store(out + 3 * num_rows + row, ratio, mask=live)
    tl.store(out + 4 * num_rows + row, low.to(tl.float32), mask=live)
    tl.store(out + 5 * num_rows + row, high.to(tl.float32), mask=live)
    tl.store(out + 6 * num_rows + row, dual.to(tl.float32), mask=live)


def random_rows(seed):
    """Float32 rows [6, N] whose log-ratios reach beyond every bound, some of them exactly 0 or hundreds of nats."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, NUM_ROWS, generator=random)
    logp = -rows[0].abs() * 3
    old_logp, ref_logp = logp + rows[1] * 0.5, logp + rows[4] * 0.5
    old_logp[:20], ref_logp[:20] = logp[:20], logp[:20]
    old_logp[20:40] += 300 * rows[5, 20:40]
    ref_logp[40:60] += 300 * rows[5, 40:60]
    ref_logp[60:80] = logp[60:80] + 1e-3 * rows[4, 60:80]
    advantages = rows[2].clone()
    advantages[80:90] = 0
    return torch.stack([logp, old_logp, advantages, rows[3].abs(), ref_logp, rows[5].exp()])


def kernel_terms(rows, selected, cfg, has_ref):
    out = torch.empty(7, NUM_ROWS)
    _terms_kernel[(1,)](
        rows, selected.to(torch.int8), out, NUM_ROWS,
        cfg.clip_low, cfg.clip_high, cfg.dual_clip or 0.0, cfg.kl_cov_coef, cfg.kl_coef,
        KINDS.index(cfg.kind), KL_KINDS.index(cfg.kl_kind), cfg.dual_clip is not None, has_ref, 512,
    )  # fmt: skip
    return out


def expected_terms(rows, selected, cfg, has_ref):
    named = dict(zip(FLOATS, rows, strict=True))
    ones = torch.ones(NUM_ROWS, dtype=rows.dtype)
    inputs = TokenInputs(
        old_logp=named["old_logp"],
        advantages=named["advantages"],
        mask=ones.bool(),
        aggregation_weight=ones,
        row_weight=named["row_weight"],
        ref_logp=named["ref_logp"] if has_ref else None,
        selected=selected if cfg.uses_covariance else None,
    )
    terms = torch_terms(named["logp"], inputs, cfg, named["sequence_ratio"] if cfg.kind == "gspo" else None)
    s = terms.surrogate
    kl = torch.zeros_like(ones) if terms.kl is None else terms.kl
    flags = [flag.to(rows.dtype) for flag in (s.clipped_low, s.clipped_high, s.dual_clipped)]
    return torch.stack([terms.policy, kl, terms.d_logp, s.ratio, *flags])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl_kind", [*KL_KINDS, None])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_token_terms_equal_the_torch_formulas(kind, kl_kind, dual_clip):
    cfg = PolicyLossConfig(kind, clip_high=0.28, dual_clip=dual_clip, kl_coef=0.3, kl_kind=kl_kind or "k3")
    rows = random_rows(KINDS.index(kind))
    selected = torch.arange(NUM_ROWS) % 3 == 0
    actual = kernel_terms(rows, selected, cfg, kl_kind is not None)
    truth = expected_terms(rows.double(), selected, cfg, kl_kind is not None)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, truth.float(), rtol=2e-5, atol=1e-7)


def test_a_nan_in_an_action_token_is_not_hidden():
    rows = random_rows(0)
    rows[0, 7] = torch.nan
    policy, _, d_logp, *_ = kernel_terms(rows, torch.zeros(NUM_ROWS, dtype=torch.bool), PolicyLossConfig(), True)
    assert torch.isnan(policy[7])
    assert torch.isnan(d_logp[7])
