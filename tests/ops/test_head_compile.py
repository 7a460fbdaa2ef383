"""logprob, linear_logprob and linear_policy_loss under torch.compile: whole graph, one compilation for every N."""

from __future__ import annotations

import pytest
import torch

from spear_kernels import linear_logprob, linear_policy_loss, logprob
from spear_kernels.linear_logprob.op import head_settings, linear_gradient, linear_statistics
from spear_kernels.linear_policy_loss.library import linear_policy_sweep
from spear_kernels.logprob.op import _gradient, _gradient_, _statistics
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.policy_loss.config import KINDS
from spear_kernels.testing import head_problem, head_with_logp, policy_config, policy_problem
from spear_kernels.vocab_parallel import VocabShard

WIDTH, VOCAB = 6, 11
SIZES = (40, 57, 211, 90)
# Recording lines slows torch's compiler several times; the operators have their lines recorded by the last test.
unrecorded = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def assert_one_graph_for_all_sizes(function, cases):
    """The compiled function gives the eager one's value and gradients; sizes become symbolic when they first change."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for index, (inputs, rest) in enumerate(cases):
        results = []
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            for call in (function, compiled):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                loss = call(*leaves, *rest)
                results.append((loss.detach(), *torch.autograd.grad(2 * loss, leaves)))
        torch.testing.assert_close(results[0], results[1])


def head_case(num_rows):
    p = policy_problem(num_rows, seed=num_rows)
    return p, head_with_logp(p, WIDTH, num_rows)


def test_logprob():
    def loss(logits, ids, temperature):
        out = logprob(logits, ids, temperature, softcap=4.0, vocab_size=10, inplace_backward=True)
        return (out.logp * 0.3 + out.entropy).sum()

    problems = [head_problem(num_rows, WIDTH, VOCAB, num_rows) for num_rows in SIZES]
    cases = [([p.hidden @ p.weight.T], (p.ids % 10, p.temperature)) for p in problems]
    assert_one_graph_for_all_sizes(loss, cases)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_logprob(masked):
    def loss(hidden, weight, bias, ids, temperature, mask):
        chosen = mask if masked else None
        out = linear_logprob(hidden, weight, ids, temperature, bias=bias, mask=chosen, chunk_bytes=9 * VOCAB * 8)
        return (out.logp * 0.3 + out.entropy).sum()

    problems = [head_problem(num_rows, WIDTH, VOCAB, num_rows) for num_rows in SIZES]
    cases = [([p.hidden, p.weight, p.bias], (p.ids, p.temperature, torch.arange(len(p.ids)) % 3 > 0)) for p in problems]
    assert_one_graph_for_all_sizes(loss, cases)


@unrecorded
@pytest.mark.parametrize("kind", KINDS)
def test_linear_policy_loss(kind):
    cfg = policy_config(kind)

    def loss(hidden, weight, bias, ids, temperature, old_logp, advantages, mask, seq_ids, ref_logp, positions):
        result = linear_policy_loss(
            hidden,
            weight,
            ids,
            old_logp,
            advantages,
            mask,
            cfg,
            seq_ids,
            temperature,
            bias=bias,
            ref_logp=ref_logp,
            positions=positions,
            chunk_bytes=9 * VOCAB * 8,
        )
        return result.loss + 0 * result.metrics["entropy"]

    cases = [
        (
            [head.hidden, head.weight, head.bias],
            (head.ids, head.temperature, p.old_logp, p.advantages, p.mask, p.seq_ids, p.ref_logp, p.positions),
        )
        for p, head in map(head_case, SIZES)
    ]
    assert_one_graph_for_all_sizes(loss, cases)


@unrecorded
def test_inductor():
    cfg = policy_config("clip_cov")

    def loss(hidden, weight, ids, old_logp, advantages, mask, ref_logp, selected):
        # Work around the operator that the compiler can fuse.
        hidden = torch.nn.functional.silu(hidden) * 2
        return linear_policy_loss(
            hidden, weight, ids, old_logp, advantages, mask, cfg, ref_logp=ref_logp, selected=selected
        ).loss

    p, head = head_case(40)
    rest = (head.ids, p.old_logp, p.advantages, p.mask, p.ref_logp, p.selection(cfg))
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [tensor.float().requires_grad_() for tensor in (head.hidden, head.weight)]
        value = call(*leaves, *rest)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("num_rows", [0, 1, 23])
def test_operators_keep_their_word_to_the_compiler(num_rows):
    """Schemas, fake implementations and gradients, as torch.library checks them."""
    p, head = head_case(max(num_rows, 1))
    rows, none = slice(0, num_rows), (None, 0.7, 0.0, VOCAB)
    hidden, ids, weight = head.hidden[rows], head.ids[rows], head.weight
    logits = (hidden @ weight.T).requires_grad_()
    torch.library.opcheck(_statistics, (logits, ids, *none, "", 0, 1, "torch", False))
    saved = _statistics(logits, ids, *none, "", 0, 1, "torch", False)[2].detach()
    rest = (ids, saved, p.old_logp[rows], p.old_logp[rows], *none, "torch")
    torch.library.opcheck(_gradient, (logits.detach(), *rest))
    torch.library.opcheck(_gradient_, (logits.detach().clone(), *rest))

    scaling = Scaling.of(0.7, None, None, hidden, VOCAB, torch.float64, VocabShard())
    settings = head_settings(scaling, VocabShard(), 9 * VOCAB * 8, "torch")
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), head.bias.requires_grad_(), ids)
    torch.library.opcheck(linear_statistics, (*tensors, None, *settings, False))
    detached = (*(tensor.detach() for tensor in tensors), p.mask[rows])
    coefficients = (saved, p.old_logp[rows], None, [True, False, True])
    torch.library.opcheck(linear_gradient, (*detached, *settings, *coefficients))

    cfg = policy_config()
    loss = (p.old_logp, p.advantages, p.mask, p.mask.double() / 9, None, p.ref_logp, None)
    names = (cfg.kind, cfg.aggregation, cfg.kl_kind, cfg.numbers(), [True, True, True])
    arguments = (*tensors, p.mask[rows], *settings, None, *(part if part is None else part[rows] for part in loss))
    # The check by tracing compares gradients with outputs that the eager backward has since scaled in place; compiled
    # results are compared above.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_policy_sweep, (*arguments, *names), test_utils=checks)
