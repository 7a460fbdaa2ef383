"""policy_loss under torch.compile: whole graph, same gradients, no recompilation for a new N; a sound operator."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified

from spear_kernels import policy_loss
from spear_kernels.policy_loss.config import AGGREGATIONS, KINDS
from spear_kernels.policy_loss.library import policy_loss_op
from spear_kernels.testing import policy_config, policy_problem

SIZES = (40, 57, 90, 130)
# Recording lines slows torch's compiler several times; test_opcheck has the lines of the operator recorded.
unrecorded = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class CountingBackend:
    """aot_eager that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_module_simplified(graph, inputs, fw_compiler=lambda part, _: make_boxed_func(part))


def tensors_of(p, dtype, chosen):
    """Arguments of `loss_and_metrics` in `dtype`; logp and entropy want gradients."""
    named = {
        name: getattr(p, name).to(dtype)
        for name in ("logp", "old_logp", "advantages", "entropy", "ref_logp", "row_weight")
    }
    named["sampler_logp"] = named["old_logp"] + 0.3 * named["advantages"]
    for name in ("logp", "entropy"):
        named[name] = named[name].detach().clone().requires_grad_()
    return {**named, "mask": p.mask, "seq_ids": p.seq_ids, "positions": p.positions, "selected": chosen}


def loss_and_metrics(tensors, cfg, **options):
    result = policy_loss(cfg=cfg, **tensors, **options)
    return result.loss * 2, result.metrics


def assert_same(compiled, eager, tensors, twins):
    (loss, metrics), (expected_loss, expected_metrics) = compiled, eager
    torch.testing.assert_close(loss, expected_loss)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[name], msg=name)
        assert not value.requires_grad
    loss.backward()
    expected_loss.backward()
    for name in ("logp", "entropy"):
        torch.testing.assert_close(tensors[name].grad, twins[name].grad)
        assert twins[name].grad.abs().max() > 0


CASES = [(kind, aggregation, True, "torch") for kind, aggregation in zip(KINDS, AGGREGATIONS * 2, strict=False)]
CASES += [
    ("clip_cov", "seq-mean-token-sum", False, "torch"),
    ("kl_cov", "token-mean", False, "triton"),
    ("clip_cov", "seq-mean-token-mean", True, "triton"),
    ("gspo", "seq-mean-token-sum-norm", True, "triton"),
]


@unrecorded
@pytest.mark.parametrize(("kind", "aggregation", "choice_inside", "backend"), CASES)
def test_after_the_second_size_nothing_is_compiled_again(kind, aggregation, choice_inside, backend):
    """One whole graph; numbers of tokens and sequences and the seed become symbolic when they first change."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    cfg, counter = policy_config(kind, aggregation, tis_cap=1.2), CountingBackend()
    compiled = torch.compile(loss_and_metrics, fullgraph=True, backend=counter)
    for seed, num_rows in enumerate(SIZES):
        p = policy_problem(num_rows, seed=num_rows)
        chosen = None if choice_inside else p.selection(cfg, seed)
        tensors, twins = tensors_of(p, dtype, chosen), tensors_of(p, dtype, chosen)
        options = {"seed": seed + 5, "num_seqs": seed + 4, "num_tokens": num_rows + seed, "backend": backend}
        actual, eager = compiled(tensors, cfg, **options), loss_and_metrics(twins, cfg, **options)
        assert_same(actual, eager, tensors, twins)
        assert counter.graphs == min(seed + 1, 2)


@unrecorded
@pytest.mark.parametrize("count", [lambda n: n + 0.5, lambda n: torch.tensor(n)])
def test_one_dynamic_graph_serves_every_number_of_tokens(count):
    cfg = policy_config()
    compiled = torch.compile(loss_and_metrics, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in SIZES:
        tensors = tensors_of(policy_problem(num_rows), torch.float64, None) | {"sampler_logp": None}
        with torch._dynamo.config.patch(error_on_recompile=num_rows != SIZES[0]):
            loss, _ = compiled(tensors, cfg, num_tokens=count(num_rows))
        torch.testing.assert_close(loss, loss_and_metrics(tensors, cfg, num_tokens=count(num_rows))[0])


@unrecorded
@torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "cpp.simdlen": 1})
def test_inductor_gives_the_same():
    p, cfg = policy_problem(70), policy_config("clip_cov", "seq-mean-token-mean", tis_cap=1.2)
    tensors, twins = (tensors_of(p, torch.float32, None) for _ in range(2))
    compiled = torch.compile(loss_and_metrics, fullgraph=True, dynamic=True)
    assert_same(compiled(tensors, cfg, seed=3), loss_and_metrics(twins, cfg, seed=3), tensors, twins)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
def test_opcheck(kind, backend, dtype):
    cfg, p = policy_config(kind, tis_cap=1.2), policy_problem(30)
    t = tensors_of(p, dtype, p.selection(cfg))
    for count, count_int in ((None, None), (torch.tensor(20), None), (None, 20)):
        arguments = (
            t["logp"], t["entropy"], t["old_logp"], t["advantages"], t["mask"], t["seq_ids"], t["ref_logp"],
            t["row_weight"], t["positions"], t["selected"], t["sampler_logp"], count, count_int, 3,
            cfg.kind, cfg.aggregation, cfg.kl_kind, cfg.numbers(), backend,
        )  # fmt: skip
        torch.library.opcheck(policy_loss_op, arguments)
