"""Vocabulary-parallel operators on gloo ranks: every rank's results are those of the unsharded head.

Four processes are started once; they run every case as a group of four and, in pairs, as groups of two.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist

from spear_kernels import linear_logprob, linear_policy_loss, logprob
from spear_kernels.testing import head_problem, head_with_logp, policy_config, policy_problem, run_ranks
from tests.triton_interpreter import patch_once_per_launch

WORLD = 4
PAIRS = ((0, 1), (2, 3))
NUM_ROWS, WIDTH, VOCAB = 17, 5, 24
# Columns of each rank: as many for all, or as they come, none among them.
EVEN = {2: (12, 12), WORLD: (6, 6, 6, 6)}
UNEVEN = {2: (5, 19), WORLD: (9, 0, 13, 2)}
KINDS = ("ppo", "clip_cov", "gspo")


def problem():
    p = policy_problem(NUM_ROWS, seed=3)
    generator = torch.Generator().manual_seed(5)
    # Ids all over the vocabulary and none in its padding.
    p.logits, p.ids = torch.zeros(NUM_ROWS, VOCAB), torch.randint(20, (NUM_ROWS,), generator=generator)
    return p, head_with_logp(p, WIDTH)


def own_part(group, widths):
    """This rank's columns, and how they are named to the operators: not at all without a group."""
    if group is None:
        return slice(0, VOCAB), {}
    if widths is EVEN:
        width = EVEN[group.size()][group.rank()]
        return slice(group.rank() * width, (group.rank() + 1) * width), {"group": group}
    ends = list(accumulate(UNEVEN[group.size()], initial=0))
    start, stop = ends[group.rank()], ends[group.rank() + 1]
    return slice(start, stop), {"group": group, "vocab_offset": start}


OPTIONS = {
    "plain": {},
    "capped": {"softcap": 3.0},
    # With 24 columns in four even parts the last rank holds padding alone from 18 on; ids go up to 19.
    "padded": {"vocab_size": 20},
}


def run_logprob(group, widths, options, dtype):
    _, head = problem()
    own, where = own_part(group, widths)
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias).to(dtype)[:, own].requires_grad_()
    out = logprob(logits, head.ids, head.temperature, **where, **options, backend=backend_of(dtype))
    loss = (out.logp * torch.linspace(-1, 2, NUM_ROWS)).sum() + 0.3 * out.entropy.sum()
    return out.logp.detach(), out.entropy.detach(), torch.autograd.grad(loss, logits)[0]


def run_linear(group, widths, options, dtype, chunk_rows=7):
    _, head = problem()
    own, where = own_part(group, widths)
    inputs = [t.to(dtype).clone().requires_grad_() for t in (head.hidden, head.weight[own], head.bias[own])]
    hidden, weight, bias = inputs
    out = linear_logprob(
        hidden,
        weight,
        head.ids,
        head.temperature,
        bias=bias,
        chunk_bytes=chunk_rows * VOCAB * 8,
        backend=backend_of(dtype),
        **where,
        **options,
    )
    loss = (out.logp * torch.linspace(-1, 2, NUM_ROWS)).sum() + 0.3 * out.entropy.sum()
    return out.logp.detach(), out.entropy.detach(), *torch.autograd.grad(loss, inputs)


def run_policy(group, widths, options, dtype, kind="ppo", compiled=False):
    p, head = problem()
    own, where = own_part(group, widths)
    inputs = [t.to(dtype).clone().requires_grad_() for t in (head.hidden, head.weight[own], head.bias[own])]
    cfg = policy_config(kind)

    def loss_of(hidden, weight, bias):
        return linear_policy_loss(
            hidden,
            weight,
            head.ids,
            p.old_logp.to(dtype),
            p.advantages.to(dtype),
            p.mask,
            cfg,
            p.seq_ids,
            head.temperature,
            bias=bias,
            ref_logp=p.ref_logp.to(dtype),
            positions=p.positions,
            chunk_bytes=7 * VOCAB * 8,
            backend=backend_of(dtype),
            **where,
            **options,
        )

    if compiled:
        loss = torch.compile(lambda *given: loss_of(*given).loss, fullgraph=True, backend="aot_eager")(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs)
    result = loss_of(*inputs)
    metrics = torch.stack(list(result.metrics.values()))
    return result.loss.detach(), *torch.autograd.grad(result.loss, inputs), result.logp, result.entropy, metrics


def backend_of(dtype):
    return "triton" if dtype == torch.float32 else "torch"


CASES = {
    f"{function.__name__}_{name}_{dtype}".replace("torch.", ""): (function, options, dtype, {})
    for function in (run_logprob, run_linear, run_policy)
    for name, options in OPTIONS.items()
    for dtype in (torch.float64, torch.float32)
} | {f"run_policy_{kind}": (run_policy, {}, torch.float64, {"kind": kind}) for kind in KINDS}


def messages(group):
    """Collectives that one linear_logprob with its backward needs: name and number of elements."""
    seen = []

    def recording(name, function):
        def call(*tensors, **options):
            seen.append((name, tensors[-1].numel()))
            return function(*tensors, **options)

        return call

    names = ("all_gather", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}
    for name, function in originals.items():
        setattr(dist, name, recording(name, function))
    try:
        run_linear(group, EVEN, {}, torch.float64)
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return seen


def run_shares(group, widths=(640, 640), vocab_size=700):
    """Forward of a fused kernel that cuts the columns of the ranks into different numbers of shares."""
    problem = head_problem(9, WIDTH, sum(widths))
    hidden, weight, ids = problem.hidden.float(), problem.weight.float(), problem.ids % 700
    if group is None:
        return tuple(linear_logprob(hidden, weight, ids, vocab_size=vocab_size))
    own = slice(0, widths[0]) if group.rank() == 0 else slice(widths[0], None)
    return tuple(linear_logprob(hidden, weight[own], ids, vocab_size=vocab_size, group=group, backend="triton"))


def run_alone():
    """A group of one rank holds everything, and ids are checked as without a group."""
    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    logits = torch.randn(3, 5)
    with pytest.raises(ValueError, match="ids hold 5"):
        logprob(logits, torch.tensor([0, 5, 1]), group=alone)
    return torch.equal(
        logprob(logits, torch.tensor([0, 4, 1]), group=alone).logp, logprob(logits, torch.tensor([0, 4, 1])).logp
    )


def refusal(group):
    """What ranks are told about an id that none of them holds."""
    with pytest.raises(ValueError, match="ids hold 24"):
        logprob(torch.zeros(2, VOCAB // group.size()), torch.tensor([0, VOCAB]), group=group)
    return True


def work(rank):
    patch_once_per_launch()
    pairs = [dist.new_group(list(ranks)) for ranks in PAIRS]
    pair = pairs[0] if rank in PAIRS[0] else pairs[1]
    found = {}
    for group in (dist.group.WORLD, pair):
        for widths, word in ((EVEN, "even"), (UNEVEN, "uneven")):
            found |= {
                (group.size(), word, name): function(group, widths, options, dtype, **more)
                for name, (function, options, dtype, more) in CASES.items()
            }
    found["messages"] = messages(pair)
    found["shares"], found["alone"], found["refused"] = run_shares(pair), run_alone(), refusal(pair)
    found["compiled"] = run_policy(pair, EVEN, {}, torch.float64, compiled=True)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


def members(size):
    return [range(WORLD)] if size == WORLD else PAIRS


def sharded_at(result, expected):
    """Places of a result that are split by vocabulary: those with another size along one dimension."""
    return [index for index, (own, whole) in enumerate(zip(result, expected, strict=True)) if own.shape != whole.shape]


@pytest.mark.parametrize("size", [2, WORLD])
@pytest.mark.parametrize("word", ["even", "uneven"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_unsharded_result(ranks, size, word, name):
    function, options, dtype, more = CASES[name]
    expected = function(None, None, options, torch.float64, **more)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    for group in members(size):
        results = [ranks[rank][size, word, name] for rank in group]
        split = sharded_at(results[0], expected)
        for index, whole in enumerate(expected):
            if index in split:
                dim = 1 if function is run_logprob else 0
                parts = [torch.cat([result[index] for result in results], dim)]
            else:
                parts = [result[index] for result in results]
            for part in parts:
                torch.testing.assert_close(part, whole.to(part.dtype), **tolerance)


def test_one_gather_of_four_numbers_per_row_and_one_sum_of_the_hidden_gradient(ranks):
    for rank in ranks:
        assert rank["messages"] == [("all_gather", 4 * NUM_ROWS), ("all_reduce", NUM_ROWS * WIDTH)]


def test_whole_graph_compiles_with_a_group(ranks):
    loss, d_hidden, d_weight, d_bias = run_policy(None, None, {}, torch.float64)[:4]
    for group in PAIRS:
        results = [ranks[rank]["compiled"] for rank in group]
        for result in results:
            torch.testing.assert_close(result[:2], (loss, d_hidden), rtol=1e-10, atol=1e-12)
        joined = tuple(torch.cat(parts) for parts in zip(*(result[2:] for result in results), strict=True))
        torch.testing.assert_close(joined, (d_weight, d_bias), rtol=1e-10, atol=1e-12)


def test_ranks_may_cut_their_columns_into_different_shares(ranks):
    expected = run_shares(None)
    for rank in ranks:
        torch.testing.assert_close(rank["shares"], expected, rtol=1e-5, atol=1e-5)


def test_a_group_of_one_is_no_group_and_foreign_ids_are_named(ranks):
    assert all(rank["alone"] and rank["refused"] for rank in ranks)


def test_an_offset_needs_a_group():
    with pytest.raises(ValueError, match="vocab_offset=3 has no meaning without group"):
        logprob(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), vocab_offset=3)
