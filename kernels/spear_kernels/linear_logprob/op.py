"""`linear_logprob`: log-probability and entropy from hidden states, without holding the logits of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spear_kernels.autocast import autocast_inputs, without_autocast
from spear_kernels.backend import resolve_backend
from spear_kernels.checks import compute_dtype, integers, refuse_second_derivatives, require_ids, require_shape
from spear_kernels.linear_logprob.head import Head, check_head, chunk_budget
from spear_kernels.linear_logprob.plan import RowPlan
from spear_kernels.linear_logprob.rows import HeadRows
from spear_kernels.linear_logprob.sums import GradientSums, Wanted, hidden_sum_dtype
from spear_kernels.logprob.rows import RowStatistics
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.results import LogProbs
from spear_kernels.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? mask, Tensor? temperature, "
    "float temperature_value, float softcap, int vocab_size, str group, int vocab_offset, "
    "int even_ranks, int chunk_bytes, str backend"
)
"""What every operator on a head begins with; from `temperature` on these are its `Settings`."""
NUM_HEAD_ARGUMENTS = HEAD_SCHEMA.count(",") + 1
Settings = tuple[torch.Tensor | None, float, float, int, str, int, int, int, str]


def head_settings(scaling: Scaling, shard: VocabShard, chunk_bytes: int, backend: str) -> Settings:
    """The settings as an operator takes them."""
    return *scaling.numbers, shard.group, shard.offset, shard.even_ranks, chunk_bytes, backend


def head_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    settings: Settings,
    plan: RowPlan,
) -> HeadRows:
    """The rows that `plan` lets in, in front of this shard's head."""
    temperature, temperature_value, softcap, vocab_size, group, vocab_offset, even_ranks, chunk_bytes, backend = (
        settings
    )
    shard = VocabShard(group, vocab_offset, even_ranks)
    scaling = Scaling(temperature, temperature_value, softcap, vocab_size)
    head = Head.of(hidden, weight, bias, vocab_size, shard.widest(len(weight)))
    if plan.unknown is None:
        require_ids(ids if plan.index is None else ids[plan.index], shard.total(vocab_size, len(weight)))
        scaling.check(plan.index)
    placed = {"index": plan.index, "unknown": plan.unknown}
    return HeadRows(hidden.detach(), shard.local_ids(ids), head, scaling, shard, backend, chunk_bytes, **placed)


def filled(gradients: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients as an operator returns them, [0] for those not wanted."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.custom_op(
    "spear_kernels::linear_statistics",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, bool keep_logits) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp [N], entropy [N], statistics [4, N], and the raw logits of the rows that entered, or of none of them."""
    *settings, keep_logits = rest
    plan = RowPlan.of(mask, None, len(ids), hidden.device)
    rows = head_rows(hidden, weight, bias, ids, tuple(settings), plan)
    logits = rows.head.buffer(len(rows) if keep_logits else 0)
    table = plan.spread(rows.statistics(logits=logits if keep_logits else None))
    return table[0].clone(), table[1].clone(), table, logits


@linear_statistics.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, *rest: Any) -> Any:
    # Logits are never kept in a compiled graph, where the number of rows that enter would be unknown.
    num_rows, dtype = ids.shape[0], compute_dtype(hidden, weight)
    vectors = hidden.new_empty(num_rows, dtype=dtype), hidden.new_empty(num_rows, dtype=dtype)
    return *vectors, hidden.new_empty(4, num_rows, dtype=dtype), hidden.new_empty(0, rest[4], dtype=dtype)


@torch.library.custom_op(
    "spear_kernels::linear_gradient",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor saved, Tensor d_logp, Tensor? d_entropy, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor)",
)
@without_autocast
def linear_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of sum(d_logp * logp + d_entropy * entropy) in hidden, weight (float32) and bias; [0]: not wanted."""
    *settings, saved, d_logp, d_entropy, wanted = rest
    gradients = _gradients(saved, (hidden, weight, bias, ids, mask), tuple(settings), d_logp, d_entropy, wanted, None)
    return filled(gradients, hidden)


@linear_gradient.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fake_gradients(hidden, weight, rest[-1])


def fake_gradients(hidden: torch.Tensor, weight: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor, ...]:
    """Tensors of the shapes and types that `filled` returns."""
    dtype = compute_dtype(hidden, weight)
    hidden_dtype = hidden_sum_dtype(hidden, dtype)
    return (
        hidden.new_empty(hidden.shape, dtype=hidden_dtype) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=dtype) if wanted[2] else hidden.new_empty(0),
    )


@without_autocast
def _gradients(
    saved: torch.Tensor,
    tensors: tuple[Any, ...],
    settings: Settings,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    wanted: Wanted,
    logits: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in hidden, weight and bias, from kept raw `logits`, which are destroyed, or by computing them again."""
    hidden, weight, bias, ids, mask = tensors
    plan = RowPlan.of(mask, None, len(ids), hidden.device)
    rows = head_rows(hidden, weight, bias, ids, settings, plan)
    if plan.unknown is not None:
        d_logp = torch.where(plan.unknown, d_logp, 0)
        d_entropy = None if d_entropy is None else torch.where(plan.unknown, d_entropy, 0)
    sums = GradientSums.zeros(rows.head, hidden, weight, rows.shard, wanted)
    rows.add_gradients(sums, RowStatistics.of(saved), (d_logp, d_entropy), logits)
    return sums.finish(hidden, rows.shard)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, temperature, *settings, keep_logits = inputs
    ctx.save_for_backward(hidden, weight, bias, ids, mask, temperature, output[2], output[3])
    ctx.settings, ctx.has_logits = tuple(settings), keep_logits
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_logp is None and d_entropy is None:
        return (None,) * (NUM_HEAD_ARGUMENTS + 1)
    refuse_second_derivatives("linear_logprob")
    *tensors, temperature, saved, logits = ctx.saved_tensors
    d_logp = torch.zeros_like(saved[0]) if d_logp is None else d_logp
    settings, wanted = (temperature, *ctx.settings), ctx.needs_input_grad[:3]
    if ctx.has_logits:
        # The gradient overwrites the logits, unseen by autograd; a second backward computes them again.
        ctx.has_logits = False
        gradients = _gradients(saved, tuple(tensors), settings, d_logp, d_entropy, wanted, logits.data)
    else:
        gradients = linear_gradient(*tensors, *settings, saved, d_logp, d_entropy, wanted)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    return *gradients_of_type(gradients, dtypes, wanted), *(None,) * (NUM_HEAD_ARGUMENTS - 2)


def gradients_of_type(
    gradients: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype | None], wanted: Wanted
) -> tuple[torch.Tensor | None, ...]:
    """Gradients rounded to the types of the inputs; None where not wanted."""
    return tuple(
        gradient.to(dtype) if want and gradient is not None and dtype is not None else None
        for gradient, dtype, want in zip(gradients, dtypes, wanted, strict=True)
    )


linear_statistics.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_offset: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of `ids` and entropy under softmax(softcap * tanh(raw / softcap) / temperature), in nats.

    raw = hidden @ weight.T + bias with hidden [N, H], weight [V, H], bias [V], any float type; ids int64 [N];
    temperature a number or [N]; softcap None for none; rows of weight from `vocab_size` on are padding. Returns logp
    and entropy [N], float32 (float64 if an input is float64), differentiable in hidden, weight and bias. Rows where
    mask bool [N] is False may hold anything and give 0; a mask on the CPU keeps them out of every product, one on a
    device lets them pass as zeros, since the host does not wait for it.

    At most `chunk_bytes` of logits exist (None: 1 GiB, on the CPU 64 MiB). If all rows fit in, the forward keeps them
    and the whole costs 6 NVH FLOPs; else the backward computes them again, 8 NVH. On the CPU, rows without a gradient
    cost the forward alone. A frozen weight saves 2 NVH. Logits and the sum of the weight gradient are float32 (float64)
    whatever the inputs are. Under autocast hidden, weight and bias take its type, as those of a linear layer do.

    Vocabulary-parallel: with `group`, weight and bias are this rank's rows of the head, by default V = vocabulary /
    ranks of them in the order of ranks, else, on every rank, those from `vocab_offset` on. All other arguments, what
    wants a gradient and the results are the same on all ranks; the gradient of hidden is summed over them. One
    all-gather of [4, N], one all-reduce of [N, H], and with `vocab_offset` one of a number that the host waits for.

    Raises:
        ValueError: wrong shape, an argument out of range (ids are looked at on the CPU only), or a backend that cannot
            run here.
    """
    check_head(hidden, weight, bias, ids)
    require_shape("mask", mask, (len(hidden),))
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    shard = VocabShard.of(group, vocab_offset, len(weight))
    dtype = compute_dtype(hidden, weight)
    scaling = Scaling.of(temperature, softcap, vocab_size, hidden, len(weight), dtype, shard)
    budget, chosen = chunk_budget(chunk_bytes, hidden.device), resolve_backend(backend, hidden, weight)
    keep = _keeps_logits(hidden, weight, bias, scaling.vocab_size, budget)
    settings = head_settings(scaling, shard, budget, chosen)
    mask = None if mask is None else mask.bool()
    logp, entropy, _, _ = linear_statistics(hidden, weight, bias, integers(ids, hidden.device), mask, *settings, keep)
    return LogProbs(logp, entropy)


def _keeps_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int, budget: int
) -> bool:
    """Whether the logits of all rows wait for the backward: if one comes and they fit."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)):
        return False
    head = Head.of(hidden, weight, bias, width, len(weight))
    # What else is made of them in the backward shares the budget: a gradient matrix, if it is one of its own.
    return len(hidden) <= head.rows_in(budget * 3 // 4 if head.splits_gradient else budget, head.dtype)
