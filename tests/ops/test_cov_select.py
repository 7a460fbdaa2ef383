"""covariance_select: exact count, uniform draw, and one answer for every order and split of the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_kernels import PolicyLossConfig, covariance_select
from spear_kernels.cov_select import covariance, covariance_metrics, covariance_select_reference, select_by_covariance
from spear_kernels.cov_select.choice import choose_rows
from spear_kernels.cov_select.draw import priorities
from spear_kernels.cov_select.library import covariance_rows, covariance_summary
from spear_kernels.cov_select.reference import priority_reference, splitmix64
from spear_kernels.testing import OperationRecorder, policy_problem

INT64 = st.integers(-(2**63), 2**63 - 1)


def select(p, cfg, seed=0, **options):
    options.setdefault("positions", p.positions)
    return covariance_select(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, seed, **options)


def uniform_problem(num_rows):
    """Unclipped tokens with covariance strictly between 0 and 2: every one is a Clip-Cov candidate."""
    signs = torch.tensor([1.0, -1.0]).double().repeat(num_rows // 2)
    logp = signs * torch.linspace(0.5, 1.5, num_rows // 2).double().repeat_interleave(2)
    everything = torch.ones(num_rows, dtype=torch.bool)
    return logp, logp.clone(), signs, everything


def test_splitmix64_known_values():
    """First outputs of the published generator from state 0: the state grows by the same increment each time."""
    increment = 0x9E3779B97F4A7C15
    outputs = [splitmix64(k * increment) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(max_examples=80)
@given(st.integers(-(2**70), 2**70), INT64, INT64)
def test_priorities_equal_python_integers(seed, seq_id, position):
    drawn = priorities(seed, torch.tensor([seq_id]), torch.tensor([position]))
    assert drawn.tolist() == [priority_reference(seed, seq_id, position)]


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(0, 90),
    st.sampled_from(["clip_cov", "kl_cov"]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_matches_the_token_loop(seed, num_rows, kind, ratio):
    p = policy_problem(num_rows, seed=seed)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=ratio, cov_lower=-0.3, cov_upper=0.8)
    expected = covariance_select_reference(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, p.positions, seed)
    assert torch.equal(select(p, cfg, seed), expected)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("num_rows", [2, 10, 100, 150, 1000])
def test_count_is_exact(kind, num_rows):
    logp, old_logp, advantages, mask = uniform_problem(num_rows)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.02, cov_lower=0.0, cov_upper=5.0)
    for seed in range(5):
        chosen = covariance_select(logp, old_logp, advantages, mask, cfg, seed=seed)
        assert chosen.sum().item() == max(1, math.floor(0.02 * num_rows))


def test_never_more_than_the_candidates():
    p = policy_problem(200)
    narrow = PolicyLossConfig(kind="clip_cov", cov_ratio=1.0, cov_lower=0.2, cov_upper=0.3)
    chosen = select(p, narrow)
    assert torch.equal(
        chosen, covariance_select_reference(p.logp, p.old_logp, p.advantages, p.mask, narrow, p.seq_ids, p.positions)
    )
    assert 0 < chosen.sum() < p.mask.sum()
    nothing = PolicyLossConfig(kind="clip_cov", cov_lower=100.0, cov_upper=200.0)
    assert not select(p, nothing).any()


def test_clipped_tokens_are_no_candidates():
    p = policy_problem(200)
    cfg = PolicyLossConfig(kind="clip_cov", cov_ratio=1.0, cov_lower=-100.0, cov_upper=100.0)
    ratio = (p.logp - p.old_logp).exp()
    clipped = ((p.advantages > 0) & (ratio > 1.2)) | ((p.advantages < 0) & (ratio < 0.8))
    assert clipped[p.mask].any()
    assert torch.equal(select(p, cfg), p.mask & ~clipped)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_row_order_does_not_matter(kind):
    p = policy_problem(300)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.1, cov_lower=-0.2, cov_upper=0.9)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = covariance_select(
        p.logp[order],
        p.old_logp[order],
        p.advantages[order],
        p.mask[order],
        cfg,
        p.seq_ids[order],
        positions=p.positions[order],
    )
    assert torch.equal(shuffled, select(p, cfg)[order])


def test_kl_cov_breaks_ties_by_the_draw_not_by_row_order():
    """Two rows in different orders with equal covariance: the same token is chosen."""
    logp = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    mask = torch.ones(4, dtype=torch.bool)
    cfg = PolicyLossConfig(kind="kl_cov", cov_ratio=0.25)
    winners = set()
    for seed in range(20):
        ids = torch.arange(4)
        chosen = covariance_select(logp, logp, advantages, mask, cfg, ids, seed, positions=ids)
        order = torch.tensor([3, 1, 0, 2])
        again = covariance_select(
            logp[order], logp, advantages[order], mask, cfg, ids[order], seed, positions=ids[order]
        )
        assert torch.equal(again, chosen[order])
        winners.add(int(chosen.nonzero()))
    assert winners == {0, 1, 2, 3}


def test_masked_rows_change_nothing_even_as_nan():
    p = policy_problem(120)
    cfg = PolicyLossConfig(kind="clip_cov", cov_ratio=0.2, cov_lower=-0.3, cov_upper=0.8)
    chosen = select(p, cfg, positions=None)
    for tensor in (p.logp, p.old_logp, p.advantages):
        tensor[~p.mask] = torch.nan
    assert torch.equal(select(p, cfg, positions=None), chosen)
    kept = p.mask
    packed = covariance_select(p.logp[kept], p.old_logp[kept], p.advantages[kept], kept[kept], cfg, p.seq_ids[kept])
    assert torch.equal(packed, chosen[kept])


def test_default_positions_are_ranks_among_action_tokens():
    p = policy_problem(120)
    cfg = PolicyLossConfig(kind="clip_cov", cov_ratio=0.2, cov_lower=-0.3, cov_upper=0.8)
    assert torch.equal(select(p, cfg, positions=None), select(p, cfg))


def test_weightless_rows_are_never_chosen():
    p = policy_problem(120)
    cfg = PolicyLossConfig(kind="kl_cov", cov_ratio=0.3)
    weight = torch.ones(120)
    weight[::2] = 0
    chosen = select(p, cfg, row_weight=weight)
    assert chosen.any()
    assert not chosen[::2].any()


def test_draw_is_uniform_over_candidates():
    """Chi-square of inclusion counts; a draw without replacement of k from n has variance s k/n (1 - k/n) each."""
    num_rows, num_chosen, num_draws = 40, 8, 1500
    logp, old_logp, advantages, mask = uniform_problem(num_rows)
    cfg = PolicyLossConfig(kind="clip_cov", cov_ratio=num_chosen / num_rows, cov_lower=0.0, cov_upper=5.0)
    counts, pairs = torch.zeros(num_rows), 0
    for seed in range(num_draws):
        chosen = covariance_select(logp, old_logp, advantages, mask, cfg, seed=seed)
        counts += chosen
        pairs += int(chosen[0] & chosen[1])
    share = num_chosen / num_rows
    chi_square = ((counts - num_draws * share) ** 2).sum() / (num_draws * share * (1 - share))
    # 39 degrees of freedom: 95 % of uniform draws lie between 23.7 and 58.1; 5.7 sigma bounds are used.
    assert 10 < chi_square < 90
    expected_pairs = num_draws * share * (num_chosen - 1) / (num_rows - 1)
    assert abs(pairs - expected_pairs) < 5 * math.sqrt(expected_pairs)


def test_seed_changes_the_draw():
    logp, old_logp, advantages, mask = uniform_problem(100)
    cfg = PolicyLossConfig(kind="clip_cov", cov_ratio=0.1, cov_lower=0.0, cov_upper=5.0)
    draws = {tuple(covariance_select(logp, old_logp, advantages, mask, cfg, seed=s).tolist()) for s in range(20)}
    assert len(draws) == 20


def test_no_host_sync_operation_is_used():
    """Reading a device value on the host would stall every loss call; the operators' bodies are seen when run bare."""
    p = policy_problem(64)
    cov = covariance(p.logp, p.advantages, p.mask)
    with OperationRecorder() as seen:
        for kind in ("clip_cov", "kl_cov"):
            select(p, PolicyLossConfig(kind=kind), positions=None)
        covariance_rows(p.logp, p.advantages, p.mask, None)
        covariance_summary(cov, p.mask, None)
        choose_rows(cov, p.mask, p.mask, p.seq_ids, p.positions, 0.1, 3, None)
    assert {"scatter_add_", "frexp"} <= seen.names
    assert not seen.host_syncs


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_micro_batches_get_slices_of_one_choice(kind):
    """A mini-batch put together from micro-batches in another order: each token's fate stays the same."""
    p = policy_problem(211)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.1, cov_lower=-0.2, cov_upper=0.9)
    chosen = select(p, cfg)
    parts = [part for size in (13, 50, 211) for part in reversed(torch.arange(211).split(size))]
    for order in (torch.cat(parts[:17]), torch.cat(parts[17:22]), parts[22]):
        columns = (p.logp, p.old_logp, p.advantages, p.mask)
        again = covariance_select(*(c[order] for c in columns), cfg, p.seq_ids[order], positions=p.positions[order])
        assert torch.equal(again, chosen[order])


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("ratio", [0.01, 0.13, 0.5, 0.99, 1.0])
def test_count_is_exact_when_all_tokens_share_a_name(kind, ratio):
    """Equal draws, and for kl_cov equal covariances in pairs: the first rows win, and never more than asked for."""
    logp, old_logp, advantages, mask = uniform_problem(100)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=ratio, cov_lower=0.0, cov_upper=5.0)
    names = torch.zeros(100, dtype=torch.int64)
    chosen = covariance_select(logp, old_logp, advantages, mask, cfg, names, positions=names)
    count = int(100 * ratio)
    assert chosen.sum() == count
    if kind == "clip_cov":
        assert chosen[:count].all()


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_cov_ratio_zero_and_one(kind):
    p = policy_problem(90)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.0, cov_lower=-100.0, cov_upper=100.0)
    assert not select(p, cfg).any()
    everything = select(p, replace(cfg, cov_ratio=1.0, clip_low=50.0, clip_high=50.0))
    assert torch.equal(everything, p.mask)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_no_mask_means_all_rows(kind):
    p = policy_problem(90)
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.2, cov_lower=-0.3, cov_upper=0.8)
    all_true = torch.ones(90, dtype=torch.bool)
    args = (p.logp, p.old_logp, p.advantages)
    chosen = covariance_select(*args, all_true, cfg, p.seq_ids)
    assert torch.equal(covariance_select(*args, None, cfg, p.seq_ids), chosen)
    cov = covariance(p.logp, p.advantages, None)
    assert torch.equal(cov, covariance(p.logp, p.advantages, all_true))
    assert torch.equal(select_by_covariance(cov, *args, None, cfg, p.seq_ids), chosen)
    assert covariance_metrics(p.logp, p.advantages, None) == covariance_metrics(p.logp, p.advantages, all_true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_logp_has_covariance_zero_exactly(dtype):
    """Every token ties, so kl_cov draws; 0.1 has no exact sum, and rounding must not invent a ranking."""
    logp = torch.full((99,), -0.1, dtype=dtype)
    advantages = policy_problem(99).advantages.to(dtype)
    mask = torch.ones(99, dtype=torch.bool)
    assert (covariance(logp, advantages, mask) == 0).all()
    assert (covariance(advantages, logp, mask) == 0).all()
    cfg = PolicyLossConfig(kind="kl_cov", cov_ratio=0.2)
    drawn = priorities(4, torch.zeros(99, dtype=torch.int64), torch.arange(99))
    chosen = covariance_select(logp, logp, advantages, mask, cfg, seed=4)
    assert torch.equal(chosen, drawn <= drawn.sort().values[18])


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e200])
def test_advantages_of_any_scale(kind, scale):
    p = policy_problem(150)
    p.advantages = p.advantages * scale
    cfg = PolicyLossConfig(kind=kind, cov_ratio=0.2, cov_lower=-0.3 * scale, cov_upper=0.8 * scale)
    chosen = select(p, cfg)
    assert chosen.any()
    assert torch.equal(
        chosen, covariance_select_reference(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, p.positions)
    )


def test_one_outlier_does_not_blur_the_others():
    """A log-prob of -1e4 widens the range that values are measured in; the other covariances keep their bits."""
    p = policy_problem(150)
    p.logp[p.mask.nonzero()[0]] = -1e4
    cov = covariance(p.logp, p.advantages, p.mask)
    advantages, logp = ([Fraction(float(x)) for x in column[p.mask]] for column in (p.advantages, p.logp))
    mean_a, mean_l = sum(advantages) / len(advantages), sum(logp) / len(logp)
    exact = [float((a - mean_a) * (x - mean_l)) for a, x in zip(advantages, logp, strict=True)]
    torch.testing.assert_close(cov[p.mask], torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=1e-12)


def test_not_finite_values_leave_the_count_and_give_no_candidates():
    """The loss of such a batch is not finite either; the selection must only not make things worse."""
    p = policy_problem(100)
    for value in (torch.nan, torch.inf, -torch.inf):
        p.logp[p.mask.nonzero()[3]] = value
        assert covariance(p.logp, p.advantages, p.mask)[p.mask].isnan().all()
        assert not select(p, PolicyLossConfig(kind="clip_cov", cov_lower=-1e9, cov_upper=1e9)).any()
        chosen = select(p, PolicyLossConfig(kind="kl_cov", cov_ratio=0.3))
        assert chosen.sum() == int(p.mask.sum() * 0.3)
        assert not chosen[~p.mask].any()


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 60), st.sampled_from([torch.float32, torch.float64]))
def test_metrics_are_quantiles_of_the_sorted_covariances(seed, num_rows, dtype):
    p = policy_problem(num_rows, seed=seed)
    metrics = covariance_metrics(p.logp.to(dtype), p.advantages.to(dtype), p.mask)
    cov = covariance(p.logp.to(dtype), p.advantages.to(dtype), p.mask)[p.mask].sort().values.tolist()
    last = len(cov) - 1
    expected = [sum(cov) / max(len(cov), 1), *(cov[int(share * last)] if cov else 0.0 for share in (0.5, 0.99, 1.0))]
    assert list(metrics) == ["cov_mean", "cov_p50", "cov_p99", "cov_max"]
    torch.testing.assert_close(torch.stack(list(metrics.values())), torch.tensor(expected).float(), atol=1e-7, rtol=0)


def test_other_kinds_select_nothing():
    p = policy_problem(10)
    with pytest.raises(ValueError, match="ppo"):
        select(p, PolicyLossConfig(kind="ppo"))
    with pytest.raises(ValueError, match="positions"):
        select(p, PolicyLossConfig(kind="kl_cov"), positions=torch.zeros(3, dtype=torch.int64))
