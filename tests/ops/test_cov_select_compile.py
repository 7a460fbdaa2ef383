"""Covariance selection under torch.compile: whole graph, no recompilation for a new N or seed, sound operators."""

from __future__ import annotations

import pytest
import torch

from spear_kernels import PolicyLossConfig, covariance_select
from spear_kernels.cov_select import covariance, covariance_metrics
from spear_kernels.cov_select.library import choose_op, covariance_op, summary_op
from spear_kernels.testing import policy_problem


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def config(kind):
    return PolicyLossConfig(kind=kind, cov_ratio=0.2, cov_lower=-0.3, cov_upper=0.8)


def select(p, cfg, seed, positions):
    return covariance_select(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, seed, positions=positions)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("named", [True, False])
def test_whole_graph_equals_eager_and_serves_every_size_and_seed(kind, named):
    cfg, graphs = config(kind), []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def compiled(logp, old_logp, advantages, mask, seq_ids, positions, seed):
        return covariance_select(logp, old_logp, advantages, mask, cfg, seq_ids, seed, positions=positions)

    for num_rows, seed in [(40, 3), (57, 4), (211, 5), (90, 2**62)]:
        p = policy_problem(num_rows, seed=num_rows)
        positions = p.positions if named else None
        chosen = compiled(p.logp, p.old_logp, p.advantages, p.mask, p.seq_ids, positions, seed)
        assert torch.equal(chosen, select(p, cfg, seed, positions))
    assert len(graphs) == 1


def test_sizes_become_dynamic_by_themselves():
    """Without dynamic=True the second size compiles once more, and no later one does."""
    cfg = config("clip_cov")
    compiled = torch.compile(covariance_select, fullgraph=True, backend="aot_eager")
    for num_rows in (40, 57):
        p = policy_problem(num_rows)
        compiled(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, 7, positions=p.positions)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (58, 300):
            p = policy_problem(num_rows)
            chosen = compiled(p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, 7, positions=p.positions)
            assert torch.equal(chosen, select(p, cfg, 7, p.positions))


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_gradients_pass_the_selection_by(kind):
    """The choice is a constant to autograd: a loss masked by it differentiates through logp alone."""
    p, cfg = policy_problem(60), config(kind)
    logp = p.logp.clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logp):
        chosen = covariance_select(
            logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, positions=p.positions, row_weight=p.row_weight
        )
        return torch.where(chosen, logp, 0).sum()

    loss(logp).backward()
    assert torch.equal(logp.grad, select(p, cfg, 0, p.positions).double())


def test_metrics_compile():
    p = policy_problem(77)
    compiled = torch.compile(covariance_metrics, fullgraph=True, backend="aot_eager")
    expected = covariance_metrics(p.logp, p.advantages, p.mask)
    for name, value in compiled(p.logp, p.advantages, p.mask).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 33])
def test_operators_pass_opcheck(dtype, num_rows):
    p = policy_problem(num_rows)
    cov = covariance(p.logp, p.advantages, p.mask)
    torch.library.opcheck(covariance_op, (p.logp.to(dtype), p.advantages.to(dtype), p.mask, None))
    torch.library.opcheck(summary_op, (cov, p.mask, None))
    for given in (None, cov):
        torch.library.opcheck(choose_op, (given, p.mask, p.mask, p.seq_ids, p.positions, 0.3, 5, None))
